"""Rows of Parquet and Arrow files, in batches, with the class names that `datasets` stored in them."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.csv_dialect import NAMELESS
from rlhf_recipes.data.reading.files import DataFile, note, open_bytes
from rlhf_recipes.data.reading.reader import Reader
from rlhf_recipes.data.reading.source import Row

BATCH = 1000  # rows
MESSAGE = ({"role", "content"}, {"from", "value"})


def arrow_rows(file: DataFile, kind: str) -> Reader:
    """Return how the rows of a file are read, with its columns, length and class names.

    Lists of messages that were stored as one list per key become lists of messages again. Images and sounds stay as
    they are stored: nothing is decoded or fetched.

    Args:
        kind: parquet or arrow.

    Raises:
        UserError: a damaged file, here or as the rows are read.
    """
    with _opened(file, kind) as (schema, length, _):
        names: list[str] = schema.names
        features = _features(schema)
        numbers = [name for name in names if name.startswith("__index_level_") and NAMELESS.fullmatch(name)]
        convert = {name: change for name in names if (change := _change(schema.field(name).type, features, name))}
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise UserError(f"{file.name} has two columns named {doubled!r}; rename one")
    if numbers:
        note("%s: the column %s numbers the rows and is left out", file.name, ", ".join(numbers))
    columns = tuple(name for name in names if name not in numbers)
    return Reader(partial(_rows, file, kind, frozenset(numbers), convert), columns, length, label_names(features))


def label_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the class names by column, from features as `datasets` writes them to JSON."""
    return {
        name: list(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _rows(
    file: DataFile, kind: str, numbers: frozenset[str], convert: Mapping[str, Callable[[Any], Any]]
) -> Iterator[Row]:
    with _opened(file, kind) as (_, _, batches):
        for batch in batches:
            for row in batch.to_pylist():
                for name in numbers:
                    del row[name]
                for name, change in convert.items():
                    row[name] = change(row[name])
                yield row


@contextmanager
def _opened(file: DataFile, kind: str) -> Iterator[tuple[Any, int, Iterator[Any]]]:
    """Open a file as its schema, its number of rows and an iterator over batches of rows."""
    import pyarrow

    try:
        with _seekable(file) as source:
            yield _parquet(source) if kind == "parquet" else _arrow(source)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file.name} cannot be read as {kind}: {reason}; copy or download it again") from None


@contextmanager
def _seekable(file: DataFile) -> Iterator[Any]:
    import pyarrow

    if file.is_plain:
        with pyarrow.memory_map(str(file.path)) as source:
            yield source
    else:  # in an archive, or compressed as a whole
        with open_bytes(file) as stream:
            yield pyarrow.BufferReader(stream.read())


def _parquet(source: Any) -> tuple[Any, int, Iterator[Any]]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(source)
    return table.schema_arrow, table.metadata.num_rows, table.iter_batches(batch_size=BATCH)


def _arrow(source: Any) -> tuple[Any, int, Iterator[Any]]:
    import pyarrow

    magic = source.read(6)
    source.seek(0)
    if magic.startswith(b"FEA1"):
        from pyarrow.feather import read_table

        table = read_table(source)
        return table.schema, table.num_rows, iter(table.to_batches(BATCH))
    opened = pyarrow.ipc.open_file(source) if magic == b"ARROW1" else pyarrow.ipc.open_stream(source)
    # The pages of a file on the disk are mapped, not read, so counting and keeping its batches costs no memory.
    whole = opened.read_all().to_batches()
    slices = (batch.slice(start, BATCH) for batch in whole for start in range(0, batch.num_rows, BATCH))
    return opened.schema, sum(batch.num_rows for batch in whole), slices


def _features(schema: Any) -> dict[str, Any]:
    """Return the features that `datasets` stored beside the schema; empty without them."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _change(kind: Any, features: Mapping[str, Any], name: str) -> Callable[[Any], Any] | None:
    """Return what turns a stored value into the value that was written; None if it is the same."""
    feature = features.get(name)
    if isinstance(feature, dict) and feature.get("_type") == "Json":
        return lambda value: value if value is None else json.loads(value)
    if isinstance(feature, list) or (isinstance(feature, dict) and feature.get("_type") in ("List", "LargeList")):
        inner = feature[0] if isinstance(feature, list) else feature.get("feature")
        if isinstance(inner, dict) and inner.get("_type") == "Json":
            return lambda value: value if value is None else [json.loads(item) for item in value]
    return (lambda value: rows_of_columns(value, name)) if _stores_messages(kind, feature) else None


def _stores_messages(kind: Any, feature: Any) -> bool:
    """Whether a struct of lists was a list of objects: by its features, or by the names of its fields."""
    import pyarrow

    if not pyarrow.types.is_struct(kind):
        return False
    fields = [kind.field(index) for index in range(kind.num_fields)]
    if not all(pyarrow.types.is_list(field.type) or pyarrow.types.is_large_list(field.type) for field in fields):
        return False
    sequence = isinstance(feature, dict) and feature.get("_type") == "Sequence"
    return sequence or any(keys <= {field.name for field in fields} for keys in MESSAGE)


def rows_of_columns(value: Any, name: str) -> Any:
    """Turn ``{"role": [...], "content": [...]}`` into a list of objects.

    Raises:
        UserError: the lists have different lengths.
    """
    if value is None:
        return None
    lists = {key: items or [] for key, items in value.items()}
    if len({len(items) for items in lists.values()}) > 1:
        raise UserError(f"the column {name} holds lists of different lengths under {', '.join(lists)}; fix the row")
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
