"""Packing documents into blocks, compared with a joined stream of ids."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.data.packing import pack_documents
from rlhf_recipes.data.rows import write_rows
from rlhf_recipes.data.sources import load_split

EOS = 256


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("block", [1, 7, 16, 400])
def test_packing_splits_the_joined_token_stream_into_blocks(
    tmp_path: Path, tokenizer: Any, block: int, streaming: bool
) -> None:
    documents = ["ab", "", "a longer document, with 中文", "x", "🙂" * 9, None, "end"] * 4
    write_rows(tmp_path / "train.jsonl", [{"text": text, "other": 1} for text in documents])
    joined = [token for text in documents if text for token in [*text.encode(), EOS]]
    expected = [joined[start : start + block] for start in range(0, len(joined) - block + 1, block)]
    packed = pack_documents(load_split(str(tmp_path), "train", streaming=streaming), tokenizer, block)
    assert [row["input_ids"] for row in packed] == expected
    assert [row["input_ids"] for row in packed] == expected, "a second epoch yields the same blocks"
    assert all(list(row) == ["input_ids"] for row in packed)


@pytest.mark.parametrize("streaming", [False, True])
def test_packing_carries_tokens_over_to_the_next_batch_of_documents(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr("rlhf_recipes.data.packing.DOCUMENTS_PER_BATCH", 3)
    write_rows(tmp_path / "train.jsonl", [{"text": "abcd"}] * 10)
    packed = pack_documents(load_split(str(tmp_path), "train", streaming=streaming), tokenizer, 7)
    joined = ([*b"abcd", EOS] * 10)[:49]
    assert [token for row in packed for token in row["input_ids"]] == joined
