"""Rows of a JSON file that holds one object: rows under a key, splits under their names, columns, or one row."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.files import DataFile
from rlhf_recipes.data.reading.source import Row
from rlhf_recipes.data.reading.splits import looks_like_split

WRAPPERS = {"data", "rows", "examples", "instances", "records", "items", "samples", "dataset", "results", "entries"}
# Names of columns: beside one of them, a list under another key belongs to the row.
OF_ROWS = {
    "instruction",
    "output",
    "prompt",
    "completion",
    "question",
    "answer",
    "chosen",
    "rejected",
    "messages",
    "text",
}
MESSAGE_KEYS = {"role", "from", "speaker"}


def document_splits(document: Any) -> list[str] | None:
    """Return the names of the splits in a document such as ``{"train": [...], "test": [...]}``; None if it has none."""
    lists = [key for key, value in document.items() if _is_rows(value)]
    return lists if lists and all(looks_like_split(key) for key in lists) else None


def document_rows(document: Mapping[str, Any], file: DataFile, split: str) -> Iterator[Row]:
    """Return the rows of a document.

    Raises:
        UserError: a split that it does not have, or an object of which one cannot tell what its rows are.
    """
    splits = document_splits(document)
    if splits is not None:
        if split not in splits:
            raise UserError(f"{file.name} has no split {split!r} (it has {', '.join(splits)}); name one of them")
        return iter(document[split])
    lists = [key for key, value in document.items() if _is_rows(value)]
    if len(lists) == 1:
        (key,) = lists
        others = [other for other, value in document.items() if other != key and isinstance(value, list)]
        is_row = bool(OF_ROWS & set(document)) or _is_conversation(document[key])
        if key.lower() in WRAPPERS and not others and not is_row:
            return iter(document[key])
        if not _is_conversation(document[key]) and _ending(file) == ".json":
            raise UserError(
                f"{file.name} holds one object with a list under {key!r}: is it one row, or are these the rows? Write "
                "the rows as an array, or one per line as .jsonl"
            )
    if _ending(file) == ".json":
        if set(document) - {"index"} == {"columns", "data"}:  # as pandas writes it with orient="split"
            names = document["columns"]
            return (dict(zip(names, cells, strict=True)) for cells in document["data"])
        if _are_columns(document):
            return _from_columns(document, file)
        if document and all(isinstance(value, dict) for value in document.values()):
            raise UserError(
                f"{file.name} holds one object with an object under {next(iter(document))!r}; write the rows as an array "
                "(jq '[.[]]' FILE), or one per line as .jsonl"
            )
    return iter([dict(document)] if document else [])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_conversation(rows: list[Any]) -> bool:
    return all(MESSAGE_KEYS & set(row) for row in rows)


def _are_columns(document: Mapping[str, Any]) -> bool:
    """Whether every value is a list of cells, or an object of cells by row number as pandas writes it."""
    values = list(document.values())
    if not values:
        return False
    if all(isinstance(value, dict) and value and all(key.isdigit() for key in value) for value in values):
        return True
    return all(isinstance(value, list) and not _is_rows(value) for value in values)


def _from_columns(document: Mapping[str, Any], file: DataFile) -> Iterator[Row]:
    keys = {
        name: list(value) if isinstance(value, dict) else list(range(len(value))) for name, value in document.items()
    }
    first = next(iter(keys.values()))
    for name, own in keys.items():
        if own != first:
            raise UserError(
                f"{file.name} holds columns of different lengths: {next(iter(keys))} has {len(first)} cells, {name} has "
                f"{len(own)}; write one object per row"
            )
    return ({name: column[key] for name, column in document.items()} for key in first)


def _ending(file: DataFile) -> str:
    name = (file.member or file.path.name).lower()
    return next((ending for ending in (".jsonl", ".ndjson", ".jl", ".json") if ending in name), "")
