"""Sources joined to one dataset: forms, limits, filters, counts, and what the chat template must read."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    COMPLETION,
    MESSAGES,
    PREFERENCE,
    PROMPT,
    TEXT,
    FormOptions,
    load_rows,
    load_split_rows,
    load_texts,
    write_rows,
)

SFT = FormOptions((COMPLETION, MESSAGES, TEXT))
PLAIN = {"prompt": "Name a colour.", "completion": " Blue."}
CHAT = {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]}


def load(folder: Path, options: FormOptions = SFT, *, extra: list[Any] | None = None, **splits: Any) -> Any:
    """Write the splits (lists of rows) and load them; keys that are no split are arguments."""
    flags = {name: splits.pop(name) for name in list(splits) if not isinstance(splits[name], list) or name in FLAGS}
    for split, rows in splits.items():
        write_rows(folder / "data" / f"{split}.jsonl", rows)
    if extra is not None:
        write_rows(folder / "extra" / "train.jsonl", extra)
        flags["extra_dataset_names"] = [str(folder / "extra")]
    return load_rows(DatasetArguments(dataset_name=str(folder / "data"), **flags), options)


FLAGS = {"row_filter", "columns", "ignore_columns", "roles"}


def test_sources_of_one_kind_are_joined(tmp_path: Path) -> None:
    """Prompts with answers and conversations become conversations; only the assistant's answers have loss."""
    turns = {"prompt": CHAT["messages"] * 2, "completion": [{"role": "assistant", "content": "Red."}]}
    rows = load(tmp_path, train=[CHAT], extra=[turns])
    assert rows.form == MESSAGES and rows.train[0]["messages"] == CHAT["messages"]
    assert [turn.get("train") for turn in rows.train[1]["messages"]] == [None, False, None, False, None]


@pytest.mark.parametrize(
    ("extra", "message"),
    [([CHAT], "holds prompt_completion and .* holds messages"), ([{"text": "a story"}], "holds text")],
)
def test_sources_of_two_kinds_are_refused(tmp_path: Path, extra: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, train=[PLAIN], extra=extra)


def test_text_and_turns_are_joined_by_a_flag(tmp_path: Path) -> None:
    pair = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "No."}
    hh = {side: f"\n\nHuman: Name a colour.\n\nAssistant: {pair[side]}" for side in ("chosen", "rejected")}
    options = FormOptions((PREFERENCE,))
    with pytest.raises(UserError, match="--as_chat true"):
        load(tmp_path, options, train=[pair], extra=[hh])
    rows = load(tmp_path, options, train=[pair], extra=[hh], as_chat=True)
    assert rows.train[0] == rows.train[1]


def test_margins_of_one_source_only(tmp_path: Path) -> None:
    pair = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "No."}
    rows = load(tmp_path, FormOptions((PREFERENCE,), margin=True), train=[pair | {"margin": 2.0}], extra=[pair])
    assert rows.train["margin"] == [2.0, 0.0]


def test_a_conversation_without_an_assistant_names_the_flag(tmp_path: Path) -> None:
    turns = {"turns": [{"speaker": "USER", "text": "Name a colour."}, {"speaker": "SYSTEM", "text": "Blue."}]}
    with pytest.raises(UserError, match="--roles assistant=NAME"):
        load(tmp_path, train=[turns])
    assert load(tmp_path, train=[turns], roles=["assistant=SYSTEM"]).train[0] == CHAT


def test_a_list_beside_a_prompt_is_of_its_row(tmp_path: Path) -> None:
    row = PLAIN | {"examples": [{"prompt": "Name a tree.", "completion": " Oak."}]}
    assert load(tmp_path, train=[row]).train[0] == PLAIN


def test_errors_name_the_held_out_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data \(test\) holds messages"):
        load(tmp_path, train=[PLAIN], test=[CHAT])


def test_filters_select_raw_rows_and_account_for_their_column(tmp_path: Path) -> None:
    labelled = [PLAIN | {"label": index % 2 == 0, "source": "web"} for index in range(4)]
    with pytest.raises(UserError, match="--row_filter label"):
        load(tmp_path, train=labelled)
    rows = load(tmp_path, train=labelled, row_filter=["label=true", "source=web"])
    assert len(rows.train) == 2 and rows.train.column_names == ["prompt", "completion"]
    assert rows.counts["train"] == {"read": 2, "used": 2}


def test_limits_count_rows_of_all_sources(tmp_path: Path) -> None:
    rows = load(
        tmp_path, train=[PLAIN] * 3, test=[PLAIN] * 3, extra=[PLAIN] * 3, max_train_samples=4, max_test_samples=2
    )
    assert (len(rows.train), len(rows.test)) == (4, 2)


def test_other_columns_reach_the_rewards_as_they_are(tmp_path: Path) -> None:
    first = {"prompt": "a", "answer": "007", "count": 3, "tags": ["x", "y"], "mixed": 1, "ids": [1, 2]}
    second = {"prompt": "b", "answer": "8", "count": 4, "tags": [], "mixed": "one"}
    rows = load(tmp_path, FormOptions((PROMPT,)), train=[first, second]).train
    assert rows[0] == first
    assert rows[1] == second | {"ids": None}


def test_requested_columns_may_be_in_one_source_only(tmp_path: Path) -> None:
    riddles = [{"riddle": "a", "solution": "b"}]
    rows = load(tmp_path, train=[PLAIN], extra=riddles, columns=["prompt=riddle"], as_chat=False)
    assert rows.train[1] == {"prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match="has no column 'nothing'"):
        load(tmp_path, train=[PLAIN], columns=["prompt=nothing"])
    with pytest.raises(UserError, match="ignore_columns names 'nothing'"):
        load(tmp_path, train=[PLAIN], ignore_columns=["nothing"])


def test_nothing_is_read_from_a_stale_cache(tmp_path: Path) -> None:
    import os

    assert load(tmp_path, train=[PLAIN]).train[0]["completion"] == " Blue."
    stat = (tmp_path / "data" / "train.jsonl").stat()
    assert load(tmp_path, train=[PLAIN | {"completion": " Reds."}]).train[0]["completion"] == " Reds."
    os.utime(tmp_path / "data" / "train.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_split_rows(str(tmp_path / "data"), "train", DatasetArguments(), SFT).train[0]["completion"] == " Reds."


def test_texts_of_every_form_train_a_tokenizer(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    for rows, texts in (
        ([CHAT], ["Name a colour.", "Blue."]),
        ([PLAIN], ["Name a colour.", " Blue."]),
        ([pair], ["p", "c", "r"]),
        ([{"text": "a story"}], ["a story"]),
    ):
        write_rows(tmp_path / "train.jsonl", rows)
        train, held_out = load_texts(DatasetArguments(dataset_name=str(tmp_path)))
        assert list(train) == list(train) == texts and held_out is None


def test_end_tokens_of_other_models_are_taken_away(tmp_path: Path, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    options = FormOptions((COMPLETION, MESSAGES), tokenizer=tokenizer)
    rows = load(tmp_path, options, train=[PLAIN | {"completion": " Blue.</s>"}, PLAIN])
    assert rows.train["completion"] == [" Blue."] * 2 and rows.counts["train"]["foreign_ends"] == 1
    own = load(tmp_path, options, train=[PLAIN | {"completion": f" Blue.{tokenizer.eos_token}"}])
    assert own.train["completion"] == [f" Blue.{tokenizer.eos_token}"]


def test_tools_that_the_chat_template_does_not_read_are_refused(tmp_path: Path, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    options = FormOptions((MESSAGES,), tokenizer=tokenizer)
    row = CHAT | {"tools": [{"type": "function", "function": {"name": "clock"}}], "chat_template_kwargs": {"mode": 1}}
    with pytest.raises(UserError, match="does not read tools; pass --ignore_columns tools"):
        load(tmp_path, options, train=[row])
    with pytest.raises(UserError, match="does not read mode; pass --ignore_columns chat_template_kwargs"):
        load(tmp_path, options, train=[row], ignore_columns=["tools"])
    tokenizer.chat_template = "{{ tools }}{{ mode }}" + tokenizer.chat_template
    kept = load(tmp_path, options, train=[row]).train[0]
    assert json.loads(json.dumps(kept)) == row


def test_plain_text_beside_a_chat_template_is_logged(
    tmp_path: Path, make_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = FormOptions((COMPLETION,), tokenizer=make_tokenizer())
    load(tmp_path, options, train=[PLAIN])
    assert "pass --as_chat true" in capsys.readouterr().err
    load(tmp_path, options, train=[PLAIN], as_chat=False)
    assert "--as_chat" not in capsys.readouterr().err
