"""Open a split of a dataset: a file, a folder, an archive or a Hub id becomes a `Source`."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.arrow_rows import arrow_rows
from rlhf_recipes.data.reading.csv_rows import csv_rows
from rlhf_recipes.data.reading.files import DataFile, Options, data_ending, format_of
from rlhf_recipes.data.reading.folders import folder_splits, pick_split
from rlhf_recipes.data.reading.hub import UnknownSplitError, hub_source
from rlhf_recipes.data.reading.json_rows import json_rows, splits_inside
from rlhf_recipes.data.reading.names import local_path
from rlhf_recipes.data.reading.reader import Reader
from rlhf_recipes.data.reading.source import Row, Source
from rlhf_recipes.data.reading.splits import looks_held_out
from rlhf_recipes.data.reading.text_rows import text_rows
from rlhf_recipes.data.reading.tree import Tree, archive_tree, folder_tree

STREAMED = 1000  # rows of a stream that are examined before it is read
DEFAULT_TEST_SPLIT = "test"


def open_source(
    name: str,
    split: str,
    *,
    config: str | None = None,
    encoding: str | None = None,
    text_by: str = "auto",
    csv_columns: Sequence[str] | None = None,
    streaming: bool = False,
) -> Source:
    """Open one split of a dataset. Nothing is renamed, converted or cached; files are read again for each iteration.

    Args:
        name: a file, a folder or a Hub id. Paths are literal, ``~`` is the home folder. A file is all of any split,
            unless it is JSON with the splits inside.
        config: the subset of a Hub dataset or of a folder.
        encoding: of text files; None: found out.
        text_by: what one row of a .txt file is: line, paragraph, document or auto.
        csv_columns: the names of the columns of tables without a header line.
        streaming: examine the first rows only, instead of checking every row now. The length is then unknown.

    Raises:
        UserError: no such source, split or subset, unreadable or ambiguous files, no rows.
    """
    path = local_path(name)
    if path is None:
        source = hub_source(name, split, config, streaming)
    else:
        options = Options(encoding, text_by, csv_columns, STREAMED if streaming else None)
        source = _source(_files(path, split, config), name, split, options)
    if source.length == 0 or (source.length is None and next(iter(source), None) is None):
        raise UserError(f"dataset {name} has no rows in its split {split!r}; give another split or file")
    return source


def open_test_source(
    name: str,
    split: str = DEFAULT_TEST_SPLIT,
    *,
    config: str | None = None,
    encoding: str | None = None,
    text_by: str = "auto",
    csv_columns: Sequence[str] | None = None,
    streaming: bool = False,
) -> Source | None:
    """Open the held-out split of a dataset; None if it has none. The arguments are those of `open_source`.

    Raises:
        UserError: the split is not the default one and does not exist, or the default one does not exist but another
            split has the name of a held-out one (validation, dev, ...).
    """
    available = _available_splits(name, config, encoding)
    if available is not None and split not in available:
        require_no_test_split(name, split, available)
        return None
    try:
        return open_source(
            name,
            split,
            config=config,
            encoding=encoding,
            text_by=text_by,
            csv_columns=csv_columns,
            streaming=streaming and available is None,
        )
    except UnknownSplitError as error:
        require_no_test_split(name, split, error.available)
        return None


def require_no_test_split(name: str, split: str, available: Sequence[str]) -> None:
    """Raise UserError unless a dataset with the `available` splits certainly has no held-out rows."""
    others = [other for other in available if looks_held_out(other)]
    if split != DEFAULT_TEST_SPLIT:
        present = f" (it has {', '.join(available)})" if available else ""
        raise UserError(
            f"dataset {name} has no split {split!r}{present}; name another one, or leave --dataset_test_split out"
        )
    if others:
        raise UserError(
            f"dataset {name} has no split {split!r}, but {', '.join(others)}; pass --dataset_test_split {others[0]}"
        )


def _available_splits(name: str, config: str | None, encoding: str | None) -> list[str] | None:
    """Return the splits of local data, empty for a file without any; None for a Hub id."""
    path = local_path(name)
    if path is None:
        return None
    if path.is_dir():
        return list(folder_splits(folder_tree(path), config))
    file = DataFile(path)
    kind = format_of(file)
    if kind == "zip":
        tree = archive_tree(path)
        return [] if _only_file(tree) else list(folder_splits(tree, config))
    return (splits_inside(file, Options(encoding)) or []) if kind == "json" else []


def _files(path: Path, split: str, config: str | None) -> list[DataFile]:
    """Return the files of one split of a file, folder or archive."""
    if path.is_dir():
        tree = folder_tree(path)
    else:
        file = DataFile(path)
        if format_of(file) != "zip":
            if config is not None:
                raise UserError(f"dataset {path} is a file, which has no subsets; leave --dataset_config out")
            return [file]
        tree = archive_tree(path)
        if only := _only_file(tree):
            return [tree.file(only)]
    return [tree.file(file) for file in pick_split(tree, folder_splits(tree, config), split)]


def _only_file(tree: Tree) -> str | None:
    """Return the data file of an archive that holds one only."""
    names = [name for name in tree.files if data_ending(name)[1]]
    return names[0] if len(names) == 1 else None


def _unpacked(file: DataFile) -> tuple[DataFile, str]:
    """Return the file, or the only one in it if it is an archive, and its format."""
    kind = format_of(file)
    if kind != "zip":
        return file, kind
    tree = archive_tree(file.path)
    only = _only_file(tree)
    if only is None:
        raise UserError(
            f"{file.name} is an archive of {', '.join(tree.files[:6]) or 'no files'}; unpack it and give the folder"
        )
    return tree.file(only), format_of(tree.file(only))


def _source(files: Sequence[DataFile], name: str, split: str, options: Options) -> Source:
    readers = _readers([_unpacked(file) for file in files], split, options)
    labels: dict[str, list[str]] = {}
    for reader in readers:
        for column, names in reader.label_names.items():
            if labels.setdefault(column, names) != names:
                raise UserError(
                    f"dataset {name}: the files name the classes of {column} differently "
                    f"({', '.join(labels[column])}; {', '.join(names)}); give them one order"
                )
    columns, length = _measured(readers, options.limit)

    def read() -> Iterator[Row]:
        return chain.from_iterable(reader.read() for reader in readers)

    return Source(name, read, columns, labels, length)


def _readers(files: Sequence[tuple[DataFile, str]], split: str, options: Options) -> list[Reader]:
    """Return how each file is read, in order."""
    texts = [file for file, kind in files if kind == "text"]
    by_text = dict(zip(texts, text_rows(texts, options), strict=True)) if texts else {}
    plan: dict[str, Callable[[DataFile], Reader]] = {
        "json": lambda file: Reader(json_rows(file, options, split)),
        "csv": lambda file: Reader(csv_rows(file, options, "csv")),
        "tsv": lambda file: Reader(csv_rows(file, options, "tsv")),
        "text": lambda file: Reader(by_text[file]),
        "parquet": lambda file: arrow_rows(file, "parquet"),
        "arrow": lambda file: arrow_rows(file, "arrow"),
    }
    return [plan[kind](file) for file, kind in files]


def _measured(readers: Sequence[Reader], limit: int | None) -> tuple[tuple[str, ...], int | None]:
    """Return the columns and the number of rows; with a limit, the columns of the first rows and no number."""
    columns: dict[str, None] = {}
    total, left = 0, limit
    for reader in readers:
        if reader.columns is not None and reader.length is not None:
            columns.update(dict.fromkeys(reader.columns if reader.length else ()))
            total += reader.length
        else:
            for row in reader.read() if left is None else islice(reader.read(), left):
                total += 1
                for name in row:
                    if name not in columns:
                        columns[name] = None
        if left is not None:
            left = limit - total if limit is not None else None
            if left is not None and left <= 0:
                break
    return tuple(columns), total if limit is None else None
