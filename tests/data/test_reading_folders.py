"""Folders: splits by file, by subfolder, by subset, by README.md; what is ambiguous or missing is an error."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading import data_splits, open_source, open_test_source


def fill(folder: Path, *names: str) -> None:
    """Write files; each has one row with its own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")


def texts(folder: Path, split: str = "train", **options: Any) -> list[str]:
    return [row["text"] for row in open_source(str(folder), split, **options)]


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl"],
        ["data/train.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ["train-00000-of-00002-a09b74b3ef9c3b56.jsonl", "train-00001-of-00002-0123456789abcdef.jsonl"],
        ["train_00001_of_00002.jsonl", "train_00002_of_00002.jsonl"],
        ["train_0.jsonl", "train_1.jsonl"],
        ["train-1.jsonl", "train-2.jsonl"],
        [f"train{number}.jsonl" for number in range(12)],
        ["part-00000.json", "part-00001.json"],
        ["part-00000-8a1b-c000.json", "part-00003-8a1b-c000.json"],
        ["0000.jsonl", "0001.jsonl"],
        ["train/0000.jsonl", "train/0001.jsonl"],
        ["train/a.jsonl", "train/b.jsonl"],
        ["data/train/part-0.jsonl", "data/train/part-1.jsonl"],
        ["default/train/0000.jsonl"],
        ["only/train.jsonl"],
    ],
)
def test_the_files_of_a_split_in_their_order(tmp_path: Path, names: list[str]) -> None:
    fill(tmp_path, *names)
    for name in ("README.md", "LICENSE.txt", "_SUCCESS", ".part-00000.crc", "train.jsonl.md5", "metrics.json"):
        (tmp_path / name).write_text("no rows")
    (tmp_path / ".git").mkdir()
    fill(tmp_path / ".git", "train.jsonl")
    assert texts(tmp_path) == names
    assert data_splits(tmp_path) == {"train": [tmp_path / name for name in names]}
    assert open_test_source(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["train.jsonl", "train.jsonl.gz"], "train.jsonl, train.jsonl.gz"),
        (["train.jsonl", "train.csv"], "train.csv, train.jsonl"),
        (["train.jsonl", "train.jsonl.bak"], "train.jsonl, train.jsonl.bak"),
        (["train.jsonl", "train.jsonl~"], "train.jsonl, train.jsonl~"),
        (["train.jsonl", "train.bak.jsonl"], "train.bak.jsonl, train.jsonl"),
        (["train.jsonl", "train (1).jsonl"], r"train \(1\).jsonl, train.jsonl|train.jsonl, train \(1\).jsonl"),
        (["train.en.jsonl", "train.zh.jsonl"], "train.en.jsonl, train.zh.jsonl"),
        (["train.jsonl", "data/train.jsonl"], "data/train.jsonl, train.jsonl|train.jsonl, data/train.jsonl"),
        (["train.jsonl", "train/0000.jsonl"], "train.jsonl, train/0000.jsonl"),
        (["train.jsonl", "train_0.jsonl"], "train.jsonl, train_0.jsonl"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"], "00001.jsonl, train-00000-of-00002"),
        (["train-00000-of-00001-aaaaaaaa.jsonl", "train-00000-of-00001-bbbbbbbb.jsonl"], "aaaaaaaa"),
        (["train/0000.jsonl", "train/0000.jsonl.gz"], "train/0000.jsonl, train/0000.jsonl.gz"),
        (["train/a.jsonl", "train/a.old.jsonl"], "a.jsonl"),
        (["train/a.jsonl", "train/b.csv"], "train/a.jsonl, train/b.csv"),
    ],
)
def test_two_candidates_for_a_split_are_refused(tmp_path: Path, names: list[str], shown: str) -> None:
    fill(tmp_path, *names, "test.jsonl")
    with pytest.raises(UserError, match=rf"several candidates for the split 'train': .*({shown})"):
        open_source(str(tmp_path), "train")
    with pytest.raises(UserError, match="several candidates"):
        data_splits(tmp_path)
    assert texts(tmp_path, "test") == ["test.jsonl"]
    assert texts(tmp_path / names[0]) == [names[0]] if names[0].endswith("jsonl") else True


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003.jsonl", "train-00001-of-00003.jsonl"], r"2 of the 3 files.*\(2 missing\)"),
        (["train-00001-of-00002.jsonl"], r"1 of the 2 files.*\(0 missing\)|\(2 missing\)"),
        (["train/x-00001-of-00003.jsonl", "train/x-00002-of-00003.jsonl"], "2 of the 3 files"),
        (["train_0.jsonl", "train_2.jsonl"], r"no split 'train' \(it has train_0, train_2\)"),
        (["train_1.jsonl"], r"no split 'train' \(it has train_1\)"),
        (["train/pos/1.txt", "train/neg/1.txt"], r"data files in subfolders of train \(neg, pos\)"),
        (["train/all.jsonl", "train/more/all.jsonl"], "data files in subfolders of train"),
        (["rows.jsonl"], r"no split 'train' \(it has rows\)"),
        (["train.xlsx"], "is a spreadsheet; save the sheet as .csv"),
        (["notes.md"], "it has no data files"),
        (["raw/x.jsonl", "clean/y.jsonl"], "but files in the folders clean, raw; give one of these folders"),
    ],
)
def test_what_is_incomplete_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    fill(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path), "train")


def test_one_of_several_numbered_files_can_be_named(tmp_path: Path) -> None:
    fill(tmp_path, "train_0.jsonl", "train_1.jsonl", "fold_0.jsonl", "fold_1.jsonl")
    assert texts(tmp_path, "train_1") == ["train_1.jsonl"]
    assert texts(tmp_path, "fold_1") == ["fold_1.jsonl"]


def test_splits_with_other_names(tmp_path: Path) -> None:
    fill(tmp_path, "train/0.jsonl", "test/0.jsonl", "hard_ones/0.jsonl", "test_prefs-00000-of-00001.jsonl")
    assert sorted(data_splits(tmp_path)) == ["hard_ones", "test", "test_prefs", "train"]
    assert texts(tmp_path, "test_prefs") == ["test_prefs-00000-of-00001.jsonl"]


def test_subsets_are_folders(tmp_path: Path) -> None:
    fill(tmp_path, "en/train.jsonl", "en/test.jsonl", "zh/train/0.jsonl", "old/notes.jsonl")
    with pytest.raises(UserError, match=r"has the subsets en, zh; pass --dataset_config en, or give the folder"):
        open_source(str(tmp_path), "train")
    assert texts(tmp_path, config="zh") == ["zh/train/0.jsonl"]
    assert texts(tmp_path / "en") == ["en/train.jsonl"]
    with pytest.raises(UserError, match=r"no subset 'fr' \(it has en, zh\)"):
        open_source(str(tmp_path), "train", config="fr")
    with pytest.raises(UserError, match="is a file, which has no subsets; leave --dataset_config out"):
        open_source(str(tmp_path / "en" / "train.jsonl"), "train", config="en")
    fill(tmp_path, "train.jsonl")
    assert texts(tmp_path) == ["train.jsonl"] and texts(tmp_path, config="en") == ["en/train.jsonl"]


@pytest.mark.parametrize(
    "others", [["validation"], ["dev", "valid", "eval"], ["test_prefs"], ["val"], ["imdb_test"], ["test1"]]
)
def test_a_held_out_split_of_another_name_is_not_passed_over(tmp_path: Path, others: list[str]) -> None:
    fill(tmp_path, "train.jsonl", *(f"{other}.jsonl" for other in others))
    with pytest.raises(UserError, match=rf"no split 'test', but .*--dataset_test_split {sorted(others)[0]}"):
        open_test_source(str(tmp_path))
    source = open_test_source(str(tmp_path), others[0])
    assert source is not None and [row["text"] for row in source] == [f"{others[0]}.jsonl"]
    with pytest.raises(UserError, match="no split 'holdout'"):
        open_test_source(str(tmp_path), "holdout")
    with pytest.raises(UserError, match="no split 'validation'"):
        open_test_source(str(tmp_path / "train.jsonl"), "validation")
    assert open_test_source(str(tmp_path / "train.jsonl")) is None


def test_a_test_split_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "test.csv", "test.jsonl")
    with pytest.raises(UserError, match="several candidates for the split 'test'"):
        open_test_source(str(tmp_path))


HEADS = {
    "list": """
- config_name: default
  data_files:
  - split: train
    path: mine/a*.jsonl
  - split: test
    path: mine/b1.jsonl""",
    "paths": """
- data_files:
  - split: train
    path: [mine/a1.jsonl, mine/a2.jsonl]
  - split: test
    path: '**/b?.jsonl'""",
    "mapping": """
- config_name: x
  data_files:
    train: ./mine/a[12].jsonl
    test: mine/b*""",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_readme_lists_the_files(tmp_path: Path, head: str) -> None:
    fill(tmp_path, "mine/a1.jsonl", "mine/a2.jsonl", "mine/b1.jsonl", "train.jsonl")
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nconfigs:{head}\n---\n# Rows\n")
    assert texts(tmp_path) == ["mine/a1.jsonl", "mine/a2.jsonl"]
    assert texts(tmp_path, "test") == ["mine/b1.jsonl"]
    assert {name: len(files) for name, files in data_splits(tmp_path).items()} == {"train": 2, "test": 1}


def test_readme_lists_subsets(tmp_path: Path) -> None:
    fill(tmp_path, "en/1.jsonl", "zh/1.jsonl", "fr/train.jsonl")
    head = "configs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: zh\n  data_files: [zh/1.jsonl]\n"
    readme = tmp_path / "README.md"
    readme.write_text(f"---\n{head}- config_name: fr\n  data_dir: fr\n---\n")
    with pytest.raises(UserError, match=r"several subsets \(en, zh, fr\); pass --dataset_config en"):
        open_source(str(tmp_path), "train")
    assert [texts(tmp_path, config=name) for name in ("en", "zh", "fr")] == [
        ["en/1.jsonl"],
        ["zh/1.jsonl"],
        ["fr/train.jsonl"],
    ]
    assert len(data_splits(tmp_path)["train"]) == 3
    readme.write_text(f"---\n{head}  default: true\n---\n")
    assert texts(tmp_path) == ["zh/1.jsonl"]
    readme.write_text("---\nconfigs:\n- data_files: data/*.parquet\n---\n")
    with pytest.raises(UserError, match=r"lists data/\*.parquet in README.md, which matches no data file"):
        open_source(str(tmp_path), "train")
    readme.write_text("---\nconfigs:\n- data_files: {train: en/*.jsonl, test: no/*.jsonl}\n---\n")
    assert texts(tmp_path) == ["en/1.jsonl"]
    with pytest.raises(UserError, match="which matches no data file"):
        open_test_source(str(tmp_path))
    readme.write_text("---\nconfigs: [\n---\n")
    with pytest.raises(UserError, match=r"YAML head of .* cannot be read"):
        open_source(str(tmp_path), "train")


def test_shards_may_differ_in_their_columns_and_types(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00002.jsonl").write_text('{"id": 1, "text": "a"}\n')
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"id": "x", "text": "b", "more": []}\n')
    source = open_source(str(tmp_path), "train")
    assert list(source) == [{"id": 1, "text": "a"}, {"id": "x", "text": "b", "more": []}]
    assert source.columns == ("id", "text", "more")
