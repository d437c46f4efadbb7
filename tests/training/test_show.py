"""`rlhf-recipes show` prints rows as the stage's model reads them, and trains nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.data import ShownRow, show_rows, write_rows

USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ROWS = {
    "sft": [{"messages": [USER, SAID | {"weight": 0}, USER, SAID]}],
    "reward": [{"prompt": [USER], "chosen": [SAID], "rejected": [SAID | {"content": "No"}], "margin": 2}],
    "dpo": [{"prompt": [USER], "chosen": [SAID], "rejected": [SAID | {"content": "No"}]}],
    "ppo": [{"prompt": [USER], "answer": "007"}],
    "rloo": [{"prompt": [USER], "answer": "007"}],
    "eval": [{"prompt": [USER], "answer": "007"}],
    "pretrain": [{"text": "a story" * 8}],
}
SHOWN = {
    "sft": ["<|user|>Hi<|end|><|assistant|>Hello<|endoftext|><|user|>Hi<|end|><|assistant|>[[Hello<|endoftext|>]]"],
    "reward": ["margin 2", "<|assistant|>Hello[[<|endoftext|>]]", "<|assistant|>No[[<|endoftext|>]]"],
    "dpo": ["<|user|>Hi<|end|><|assistant|>[[Hello<|endoftext|>]]", "<|assistant|>[[No<|endoftext|>]]"],
    "ppo": ["<|user|>Hi<|end|><|assistant|>\n", "for the rewards: answer='007'", "the model reads 75"],
    "rloo": ["<|user|>Hi<|end|><|assistant|>\n", "for the rewards: answer='007'"],
    "eval": ["<|user|>Hi<|end|><|assistant|>\n", "for the rewards: answer='007'"],
    "pretrain": ["[[a storya"],
}
FLAGS = {"eval": ["--dataset_split", "train"], "pretrain": ["--max_length", "16"]}


@pytest.fixture
def model_folder(make_model: Any, make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", ROWS)
def test_rows_are_shown_as_the_stage_reads_them(
    stage: str, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_recipes.__main__ import main

    write_rows(tmp_path / "train.jsonl", ROWS[stage])
    name = "--models" if stage == "eval" else "--model_name_or_path"
    flags = ["--dataset_name", str(tmp_path), name, str(model_folder), *FLAGS.get(stage, [])]
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "show", stage, *flags])
    monkeypatch.chdir(tmp_path)
    main()
    shown = capsys.readouterr().out
    assert "train: 1 rows" in shown or stage == "pretrain"
    for text in SHOWN[stage]:
        assert text in shown
    assert sorted(tmp_path.iterdir()) == before


def test_an_unknown_stage_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_recipes", "show", "tokeniser"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: unknown stage 'tokeniser'")


def test_colours_mark_the_same_tokens_as_brackets(make_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ShownRow("row 0", [72, 105, 33], [False, True, True], "note")]
    show_rows(rows, make_tokenizer(), colours=False)
    plain = capsys.readouterr().out
    assert "H[[i!]]" in plain and "3 tokens, 2 with loss, note" in plain
    show_rows(rows, make_tokenizer(), colours=True)
    assert "H\x1b[30;42mi!\x1b[0m" in capsys.readouterr().out
