"""Parquet, Arrow and folders of `save_to_disk`: rows, class names, messages; nothing is decoded or cached."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading import open_source, open_test_source
from rlhf_recipes.data.reading.names import BUILDERS

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [{"text": f"row {index}", "label": index % 2, "messages": MESSAGES, "none": None} for index in range(2500)]


def write(path: Path, table: Any) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        open_writer = pyarrow.ipc.new_file if path.stem == "file" else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(path), "wb") as sink, open_writer(sink, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow", "a.feather"])
def test_rows_are_read_in_order(tmp_path: Path, name: str, streaming: bool) -> None:
    write(tmp_path / name, pyarrow.Table.from_pylist(ROWS))
    source = open_source(str(tmp_path / name), "train", streaming=streaming)
    assert list(source) == ROWS and source.columns == tuple(ROWS[0]) and source.length == (None if streaming else 2500)
    (tmp_path / "renamed.jsonl").write_bytes((tmp_path / name).read_bytes())
    assert list(open_source(str(tmp_path / "renamed.jsonl"), "train")) == ROWS


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "content", [b"", b"PAR1 broken", b"ARROW1 broken", b"\xff\xff\xff\xff\x10\x00\x00\x00ab", b'{"a": 1}']
)
def test_a_damaged_file_is_one_line(tmp_path: Path, kind: str, content: bytes) -> None:
    (tmp_path / f"a.{kind}").write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(open_source(str(tmp_path / f"a.{kind}"), "train"))
    assert "\n" not in str(caught.value)


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pyarrow.table({"text": pyarrow.array([], pyarrow.string())}))
    with pytest.raises(UserError, match="has no rows"):
        open_source(str(tmp_path / "a.parquet"), "train")


def test_class_names_are_kept(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    dataset.to_parquet(str(tmp_path / "train.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    for place in ("train.parquet", "saved"):
        source = open_source(str(tmp_path / place), "train")
        assert source.label_names == {"label": ["pos", "neg"]} and [row["label"] for row in source] == [0, 1]


def test_class_names_that_differ_by_file_are_an_error(tmp_path: Path) -> None:
    for index, names in enumerate((["pos", "neg"], ["neg", "pos"])):
        features = datasets.Features({"label": datasets.ClassLabel(names=names)})
        dataset = datasets.Dataset.from_dict({"label": [0, 1]}, features=features)
        dataset.to_parquet(str(tmp_path / f"train-0000{index}-of-00002.parquet"))
    with pytest.raises(UserError, match="name the classes of label differently"):
        open_source(str(tmp_path), "train")


def test_saved_datasets_and_their_splits(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:3])
    train.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    assert (
        list(open_source(str(tmp_path / "one"), "train")) == ROWS and open_test_source(str(tmp_path / "one")) is None
    )
    assert list(open_source(str(tmp_path / "both"), "train")) == ROWS
    assert list(open_source(str(tmp_path / "both"), "test")) == ROWS[:3]
    assert list(open_source(str(tmp_path / "both" / "test"), "train")) == ROWS[:3]
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"misses data-00001-of-00003\.arrow"):
        open_source(str(tmp_path / "one"), "train")


def test_a_cache_folder_of_datasets(tmp_path: Path) -> None:
    write(tmp_path / "json-train-00000-of-00001.arrow", pyarrow.Table.from_pylist(ROWS))
    write(tmp_path / "json-test.arrow", pyarrow.Table.from_pylist(ROWS[:2]))
    write(tmp_path / "cache-0123.arrow", pyarrow.Table.from_pylist(ROWS[:1]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"splits": {"train": {}, "test": {}}}))
    assert list(open_source(str(tmp_path), "train")) == ROWS and list(open_source(str(tmp_path), "test")) == ROWS[:2]


def test_messages_stored_by_key_are_messages_again(tmp_path: Path) -> None:
    columns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    write(tmp_path / "a.parquet", pyarrow.Table.from_pylist([{"messages": columns, "other": {"x": [1], "y": [2]}}]))
    (row,) = open_source(str(tmp_path / "a.parquet"), "train")
    assert row == {"messages": MESSAGES, "other": {"x": [1], "y": [2]}}
    write(tmp_path / "a.parquet", pyarrow.Table.from_pylist([{"messages": {"role": ["user"], "content": []}}]))
    with pytest.raises(UserError, match="lists of different lengths under role, content"):
        list(open_source(str(tmp_path / "a.parquet"), "train"))


def test_values_that_datasets_stores_as_json_are_values_again(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"mixed": [1, "a", {"b": 2}]}, on_mixed_types="use_json")
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    assert [row["mixed"] for row in open_source(str(tmp_path / "a.parquet"), "train")] == [1, "a", {"b": 2}]


def test_the_numbers_of_rows_are_left_out(tmp_path: Path, caplog: Any) -> None:
    import pandas

    pandas.DataFrame({"text": ["a", "c"]}, index=[7, 3]).to_parquet(tmp_path / "a.parquet")
    assert list(open_source(str(tmp_path / "a.parquet"), "train")) == [{"text": "a"}, {"text": "c"}]
    assert "__index_level_0__ numbers the rows" in caplog.text


def test_images_are_neither_decoded_nor_fetched(tmp_path: Path) -> None:
    """A fetch would fail this test: tests reach no other machine."""
    stored = {"bytes": None, "path": "http://example.org/leak.png"}
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"text": ["a"], "image": pyarrow.array([stored], type=kind)})
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    write(tmp_path / "a.parquet", table)
    assert list(open_source(str(tmp_path / "a.parquet"), "train")) == [{"text": "a", "image": stored}]


class TestNames:
    """What `--dataset_name` may be."""

    @pytest.mark.parametrize(
        "name", ["train [v2].jsonl", "tr*in.jsonl", "[2024] data/train.jsonl", "what?.jsonl", "a{b}.jsonl"]
    )
    def test_paths_are_literal(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "right"}')
        (tmp_path / "train.jsonl").write_text('{"text": "wrong"}')
        assert list(open_source(str(tmp_path / name), "train")) == [{"text": "right"}]
        if "/" in name:
            assert list(open_source(str(tmp_path / name.split("/")[0]), "train")) == [{"text": "right"}]

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "train.jsonl").write_text('{"text": "a"}')
        for name in ("~/train.jsonl", "~"):
            assert list(open_source(name, "train")) == [{"text": "a"}]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "--dataset_name"),
            ("text", "the name of a format"),
            ("JSON", "the name of a format"),
            ("imagefolder", "the name of a format"),
            ("rows*.jsonl", "patterns are not expanded; .*--extra_dataset_names"),
            ("https://example.org/train.jsonl", "is an address; download it"),
            ("s3://bucket/train.jsonl", "is an address; download it"),
            ("hf://datasets/me/rows", "give the Hub id me/rows$"),
            ("hf://datasets/me/rows@main/train.jsonl", "give the Hub id me/rows, or download that file"),
            ("https://huggingface.co/datasets/me/rows", "give the Hub id me/rows$"),
            ("./nowhere", "no such file or folder"),
            ("nobody/some.xlsx", "no such file or folder"),
            ("a/b/c", "no such file or folder"),
            ("nobody/some-2.5", "as a Hub id it cannot be fetched"),
            ("x" * 5000, "File name too long"),
            ("/dev/null", "pipe or device"),
        ],
    )
    def test_other_names_are_refused(
        self, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "secret.txt").write_text("not to be read")
        with pytest.raises(UserError, match=message) as caught:
            open_source(name, "train")
        assert "\n" not in str(caught.value)

    def test_every_reader_of_datasets_is_a_known_name(self) -> None:
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        assert set(_PACKAGED_DATASETS_MODULES) - BUILDERS == set()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "a.jsonl",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n",
                "pointer of Git LFS.*git lfs pull",
            ),
            ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "pointer of Git LFS"),
            ("a.csv", b"\n <!DOCTYPE html><html></html>", "holds a web page"),
            ("a.xlsx", b"PK\x03\x04", "cannot be unpacked|a spreadsheet"),
            ("a.pkl", b"\x80\x04\x95", "a pickle"),
            ("a.pdf", b"%PDF-1.7", "a document"),
            ("a.jsonl", b"%PDF-1.7", "a document"),
            ("a.npy", b"\x93NUMPY", "a NumPy array"),
            ("a.safetensors", b"\x00", "made of tensors"),
            ("a.tar", b"x" * 257 + b"ustar", "an archive; unpack it"),
            ("a.tar.gz", b"\x1f\x8b", "cannot be decompressed"),
            ("a", b"plain", "no known ending"),
        ],
    )
    def test_other_formats_are_named(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name), "train")
