"""Rows from files and Hub repos, splits, limits, filters and extra datasets, and checks of columns."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.checks import require_held_out
from rlhf_recipes.data.forms import TEXT, FormOptions, load_rows
from rlhf_recipes.data.rows import require_columns, write_rows
from rlhf_recipes.data.sources import load_split

ROWS = [
    {"text": f"row {index}", "source": "even" if index % 2 == 0 else "odd", "year": index // 3} for index in range(9)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows" / "train.jsonl", ROWS)
    write_rows(tmp_path / "rows" / "test.jsonl", [{"text": "held out", "source": "odd", "year": 0}] * 2)
    return tmp_path / "rows"


def load_train_and_test(arguments: DatasetArguments, streaming: bool = False) -> tuple[Any, Any]:
    rows = load_rows(arguments, FormOptions((TEXT,)), streaming=streaming)
    return rows.train, rows.test


def texts(dataset: Any) -> list[str]:
    return [row["text"] for row in dataset]


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet", "txt", "txt.gz"])
def test_all_file_formats_load_the_same_rows(tmp_path: Path, extension: str) -> None:
    import pandas

    frame = pandas.DataFrame({"text": ["eins, zwei", "三", "🙂"]})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in frame.to_dict("records"))
    contents = {
        "jsonl": lines.encode(),
        "json": json.dumps(frame.to_dict("records")).encode(),
        "csv": frame.to_csv(index=False).encode(),
        "tsv": frame.to_csv(index=False, sep="\t").encode(),
        "txt": "\n".join(frame["text"]).encode(),
        "parquet": frame.to_parquet(),
    }
    content = contents[extension.removesuffix(".gz")]
    file = tmp_path / f"train.{extension}"
    file.write_bytes(gzip.compress(content) if extension.endswith(".gz") else content)
    assert texts(load_split(str(file), "train")) == list(frame["text"])
    assert texts(load_split(str(tmp_path), "train", streaming=True)) == list(frame["text"])


def test_shards_in_a_data_folder_form_one_split(tmp_path: Path) -> None:
    for part in (0, 1):
        write_rows(tmp_path / "data" / f"train-0000{part}-of-00002.jsonl", ROWS[part * 5 : part * 5 + 5])
    assert texts(load_split(str(tmp_path), "train")) == [row["text"] for row in ROWS]


def test_splits_and_limits(folder: Path) -> None:
    train, test = load_train_and_test(DatasetArguments(dataset_name=str(folder), max_train_samples=4))
    assert texts(train) == [row["text"] for row in ROWS[:4]] and texts(test) == ["held out"] * 2
    (folder / "test.jsonl").unlink()
    assert load_train_and_test(DatasetArguments(dataset_name=str(folder)))[1] is None
    assert load_train_and_test(DatasetArguments(dataset_name=str(folder / "train.jsonl")))[1] is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row_filter", "matches"),
    [
        (["source=odd"], lambda row: row["source"] == "odd"),
        (["source=odd", "source=even"], lambda row: True),
        (["source=even", "year=1"], lambda row: row["source"] == "even" and row["year"] == 1),
    ],
)
def test_row_filter(folder: Path, streaming: bool, row_filter: list[str], matches: Callable[[Any], bool]) -> None:
    """Values of one column are joined by OR, columns by AND; `max_train_samples` counts the filtered rows."""
    expected = [row["text"] for row in ROWS if matches(row)]
    arguments = DatasetArguments(dataset_name=str(folder / "train.jsonl"), row_filter=row_filter)
    assert texts(load_train_and_test(arguments, streaming=streaming)[0]) == expected
    arguments.max_train_samples = 2
    assert texts(load_train_and_test(arguments, streaming=streaming)[0]) == expected[:2]


def test_row_filter_applies_to_the_test_split(folder: Path) -> None:
    with pytest.raises(UserError, match=r"test.*no row with source in \['even'\]"):
        load_train_and_test(DatasetArguments(dataset_name=str(folder), row_filter=["source=even"]))


@pytest.mark.parametrize("streaming", [False, True])
def test_extra_datasets_are_appended(folder: Path, tmp_path: Path, streaming: bool) -> None:
    """A filter skips a dataset without its column; the test split is the first dataset's."""
    write_rows(tmp_path / "more" / "train.jsonl", [{"label": 1, "text": "further"}])
    write_rows(tmp_path / "more" / "test.jsonl", [{"label": 1, "text": "must not be read"}])
    arguments = DatasetArguments(
        dataset_name=str(folder), extra_dataset_names=[str(tmp_path / "more")], row_filter=["source=odd"]
    )
    train, test = load_train_and_test(arguments, streaming=streaming)
    assert list(train) == [{"text": text} for text in ("row 1", "row 3", "row 5", "row 7", "further")]
    assert texts(test) == ["held out"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_filter": ["source"]}, "column=value"),
        ({"row_filter": ["sauce=odd"]}, "row_filter names the column sauce, but the dataset has text, source, year"),
        ({"row_filter": ["source=none"]}, "no row"),
        ({"dataset_train_split": "validation"}, r"no split 'validation' \(it has test, train\)"),
        ({"max_train_samples": 0}, "at least 1"),
        ({"dataset_name": None}, "--dataset_name"),
        ({"dataset_name": "nobody/nothing"}, "HF_HUB_OFFLINE=1"),
        ({"dataset_name": "./nowhere"}, "no such file or folder"),
    ],
)
def test_errors_name_the_invalid_dataset_option(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_train_and_test(DatasetArguments(**{"dataset_name": str(folder), **options}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b"", "no rows|cannot be read"),
        ("train.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2, column 10 cannot be read as JSON"),
        ("train.jsonl.gz", b"no gzip at all", "is not gzip data"),
        ("train.parquet", b"PAR1 broken", "cannot be read as parquet"),
        ("train.doc", b"text", "no known ending"),
    ],
)
def test_an_unreadable_file_is_a_one_line_error(
    tmp_path: Path, name: str, content: bytes, message: str, streaming: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_split(str(tmp_path / name), "train", streaming=streaming)
    assert "\n" not in str(caught.value)


def test_columns_are_checked_by_name(folder: Path) -> None:
    dataset = load_split(str(folder), "train")
    assert require_columns(dataset, ("prompt",), ("text", "year")) == ("text", "year")
    with pytest.raises(UserError, match=r"needs the columns prompt or messages, but has text, source, year"):
        require_columns(dataset, ("prompt",), ("messages",))


def test_a_dot_in_a_repo_id_is_no_file_extension() -> None:
    for name in ("nobody/some-2.5", "nobody/some-v0.2"):
        with pytest.raises(UserError, match="as a Hub id it cannot be fetched"):
            load_split(name, "train")
    for name in ("nobody/some.jsonl", "some.csv.gz", "../some-2.5"):
        with pytest.raises(UserError, match="no such file or folder"):
            load_split(name, "train")


def test_every_split_of_a_streamed_repo_is_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without streaming, `load_dataset` downloads all splits of a repo to return one."""
    import datasets

    load, requested = datasets.load_dataset, []

    def load_dataset(name: str, config: Any, split: str, streaming: bool) -> Any:
        requested.append((split, streaming))
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            raise ValueError(f"Unknown split {split}")
        return load("json", data_files=str(file), split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = DatasetArguments(
        dataset_name="me/rows", max_train_samples=3, max_test_samples=1, row_filter=["source=odd"]
    )
    train, test = load_train_and_test(arguments, streaming=True)
    assert requested == [("train", True), ("test", True)]
    assert texts(train) == ["row 1", "row 3", "row 5"] and test["text"] == ["held out"]
    (folder / "test.jsonl").unlink()
    assert load_train_and_test(DatasetArguments(dataset_name="me/rows"), streaming=True)[1] is None
    with pytest.raises(UserError, match="has no split 'none'"):
        load_train_and_test(DatasetArguments(dataset_name="me/rows", dataset_test_split="none"), streaming=True)


def test_evaluation_without_a_test_split_is_refused() -> None:
    from transformers import TrainingArguments

    training = TrainingArguments("out", eval_strategy="epoch", use_cpu=True)
    with pytest.raises(UserError, match="eval_strategy is epoch, but the dataset has no split 'validation'"):
        require_held_out(None, training, "validation")
    require_held_out([{}], training, "validation")
    require_held_out(None, TrainingArguments("out", use_cpu=True), "validation")
