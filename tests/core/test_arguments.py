"""Flags: what is said about words that no flag takes."""

from pathlib import Path

import pytest

from rlhf_recipes.core.arguments import DatasetArguments, OutputArguments, parse_arguments
from rlhf_recipes.core.errors import UserError


def test_a_second_dataset_names_the_flag_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell writes ``--dataset_name a*.jsonl``."""
    monkeypatch.chdir(tmp_path)
    for name in ("a1.jsonl", "a2.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"unexpected argument 'a2.jsonl'; .*: --extra_dataset_names a2.jsonl"):
        parse_arguments(DatasetArguments, argv=["--dataset_name", "a1.jsonl", "a2.jsonl"])
    for types, word in (((DatasetArguments,), "a3.jsonl"), ((OutputArguments,), "a2.jsonl")):
        with pytest.raises(UserError, match=r"unexpected argument .*; values follow a --flag"):
            parse_arguments(*types, argv=[word])


def test_columns_of_tables_are_a_list() -> None:
    (arguments,) = parse_arguments(DatasetArguments, argv=["--csv_columns", "label", "text"])
    assert arguments.csv_columns == ["label", "text"]
