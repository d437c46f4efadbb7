"""JSON files: lines, arrays, objects that hold the rows; values stay as they are written; errors name the line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading import json_rows as module
from rlhf_recipes.data.reading import open_source, open_test_source

ROWS = [{"text": "one", "id": 1}, {"text": "zwei\n三 🙂", "id": "2"}, {"text": "", "id": None}]


def rows_of(path: Path, content: str | bytes, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(open_source(str(path), split, **options))


def error_of(path: Path, content: str | bytes, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, content, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "A.JSONL"])
def test_lines_and_arrays_hold_the_same_rows(tmp_path: Path, name: str, streaming: bool) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    for content in (
        lines,
        lines + "\n",
        lines.replace("\n", "\r\n\r\n"),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=4),
    ):
        assert rows_of(tmp_path / name, content, streaming=streaming) == ROWS


def test_a_row_may_be_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    for indent in (None, 1):
        assert rows_of(tmp_path / "a.json", json.dumps(ROWS * 3, indent=indent)) == ROWS * 3


def test_strings_that_look_like_something_else_stay_strings(tmp_path: Path) -> None:
    row = {"date": "2021-03-01", "zero": "007", "word": "null", "time": "10:00", "big": 2**80, "mixed": [1, "a", None]}
    assert rows_of(tmp_path / "a.jsonl", json.dumps(row)) == [row]


def test_not_a_number_stays_a_float(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "a.jsonl", '{"score": NaN, "text": "a"}')
    assert math.isnan(row["score"]) and row["text"] == "a"


def test_columns_are_those_of_all_rows_and_absent_keys_stay_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": 2, "a": 3}\n')
    source = open_source(str(path), "train")
    assert (source.columns, source.length, list(source)) == (("a", "b"), 2, [{"a": 1}, {"b": 2, "a": 3}])
    assert list(source) == list(source)


def test_a_changed_file_is_read_again_whatever_its_time(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.jsonl"
    for text in ("old", "new"):
        path.write_text(json.dumps({"text": text}))
        os.utime(path, (1, 1))
        assert list(open_source(str(path), "train")) == [{"text": text}]


@pytest.mark.parametrize(
    "document",
    [
        {"version": "1", "data": ROWS},
        {"rows": ROWS},
        {"train": ROWS, "test": ROWS[:1]},
        {"text": [row["text"] for row in ROWS], "id": [row["id"] for row in ROWS]},
        {
            "text": {str(index): row["text"] for index, row in enumerate(ROWS)},
            "id": {str(index): row["id"] for index, row in enumerate(ROWS)},
        },
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_may_hold_the_rows(tmp_path: Path, document: Any, indent: int | None) -> None:
    assert rows_of(tmp_path / "a.json", json.dumps(document, indent=indent)) == ROWS


def test_splits_in_one_file_are_read_apart(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1], "dev": ROWS[1:]}))
    test = open_test_source(str(path))
    assert test is not None and list(test) == ROWS[:1]
    with pytest.raises(UserError, match=r"no split 'validation' \(it has train, test, dev\)"):
        open_source(str(path), "validation")
    path.write_text(json.dumps({"train": ROWS, "dev": ROWS[1:]}))
    with pytest.raises(UserError, match="--dataset_test_split dev"):
        open_test_source(str(path))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_one_row_is_one_row(tmp_path: Path, name: str) -> None:
    messages = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for row in (messages, {"prompt": "a", "answers": ["b", "c"], "scores": [1, 2]}, {"text": "a"}):
        assert rows_of(tmp_path / name, json.dumps(row)) == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n\n{"a": 2,}\n', "line 3, column 9 cannot be read as JSON"),
        ('{"a": 1}\n{"a": "open\n', "line 2"),
        ('[{"a": 1},\n {"a": 2}\n {"a": 3}]', "line 3: a comma is missing"),
        ('[{"a": 1},\n {"a" 2}]', "line 2, column 7"),
        ('[{"a": 1},\n {"a": 2}', "has no end"),
        ('[{"a": 1},\n', "has no end"),
        ('["one", "two"]', "line 1: a string is not a row"),
        ('[["one"]]', "line 1: a list is not a row"),
        ('[{"role": "user"}]\n[{"role": "user"}]', "something follows the first array"),
        ('{"a": 1}\n[1]\n', "line 2: a list is not a row"),
        ('{\n"a": 1\n}\n{\n"a": 2\n}', "line 4: a second object begins"),
        ("prompt,completion\na,b\n", "line 1: 'prompt,completion' is not JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"a": 1}\n{"a": "\\ud83d"}\n', "line 2: half of a character"),
        ('[{"a": "\\ud83d"}]', "half of a character"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("[]", "has no rows"),
        ("{}", "has no rows"),
        ('{"data": []}', "has no rows|different"),
    ],
)
def test_invalid_json_is_an_error_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    import re

    assert re.search(message, error_of(tmp_path / "a.json", content))


def test_a_pair_of_escapes_is_one_character(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude42"}') == [{"a": "🙂"}]


def test_an_object_that_may_be_rows_or_one_row_is_refused(tmp_path: Path) -> None:
    content = json.dumps({"questions": [{"q": "a"}, {"q": "b"}]})
    assert "is it one row, or are these the rows?" in error_of(tmp_path / "a.json", content)
    assert len(rows_of(tmp_path / "a.jsonl", content)) == 1
    unequal = json.dumps({"a": ["x", "y"], "b": ["z"]})
    assert "a has 2 cells, b has 1" in error_of(tmp_path / "a.json", unequal)
