"""Rows from a folder, a file or a Hub id."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.files import write_text

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SHARD = re.compile(r"-\d+-of-\d+$")
# file ending -> builder of the datasets library; each may be followed by .gz
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_split(
    name: str,
    split: str,
    *,
    config: str | None = None,
    max_samples: int | None = None,
    streaming: bool = False,
) -> "Dataset | IterableDataset":
    """One split of a dataset, checked not to be empty.

    name: a folder with ``<split>.jsonl`` (or .csv, .parquet, ... also .gz, also in shards such as
    ``<split>-00000-of-00002.parquet``, also in its subfolder ``data``), one such file, or a Hub id.

    Raises:
        UserError: no such source or split, an unreadable file, an empty split, a Hub id while offline.
    """
    path = Path(name).expanduser()
    if path.is_file():
        dataset = _load([path], name, streaming)
    elif path.is_dir():
        dataset = _load(_split_files(path, split), name, streaming)
    else:
        dataset = _from_hub(name, config, split, streaming)
    if first_row(dataset) is None:
        raise UserError(f"dataset {name} has no rows in its split {split!r}; give another split or file")
    return _first(dataset, max_samples)


def load_train_and_test(
    arguments: DatasetArguments, name: str | None = None, streaming: bool = False
) -> "tuple[Any, Any | None]":
    """The training split and, where the source has it, the held-out split of `arguments.dataset_name` (or `name`).

    `arguments.row_filter` holds for both, `arguments.extra_dataset_names` lengthens the training split, and the limits
    on samples count what is left after that.
    """
    train = _first(_joined(load_training_sources(arguments, name, streaming)), arguments.max_train_samples)
    return train, load_test_split(arguments, name, streaming)


def load_test_split(arguments: DatasetArguments, name: str | None = None, streaming: bool = False) -> "Any | None":
    """The held-out split of `arguments.dataset_name` (or `name`), filtered and limited; None where it has none.

    streaming: a dataset of the Hub is read as a stream, since asking for one split fetches all of them otherwise. What
    is left of it is in memory.
    """
    source = str(name or arguments.dataset_name)
    test = _load_test(arguments, source, streaming)
    if test is None:
        return None
    rules = parse_row_filter(arguments.row_filter or [])
    test = filter_rows(test, rules, f"{source} ({arguments.dataset_test_split})")
    return _in_memory(_first(test, arguments.max_test_samples))


def load_training_sources(arguments: DatasetArguments, name: str | None = None, streaming: bool = False) -> list[Any]:
    """The training split of each source, filtered: `dataset_name` (or `name`) first, then the extra ones."""
    source = name or arguments.dataset_name
    if not source:
        raise UserError("no dataset; pass --dataset_name with a folder, a data file or a Hub id")
    sources = [source, *(arguments.extra_dataset_names or [])]
    rules = parse_row_filter(arguments.row_filter or [])
    split, config = arguments.dataset_train_split, arguments.dataset_config
    parts = [load_split(part, split, config=config, streaming=streaming) for part in sources]
    _require_filtered_columns(parts, rules)
    return [filter_rows(part, rules, f"{one} ({split})") for part, one in zip(parts, sources, strict=True)]


def _load_test(arguments: DatasetArguments, source: str, streaming: bool) -> "Any | None":
    path = Path(source).expanduser()
    split = arguments.dataset_test_split
    if path.is_file() or (path.is_dir() and split not in data_splits(path)):
        return None
    try:
        streams = streaming and not path.exists()
        return load_split(source, split, config=arguments.dataset_config, streaming=streams)
    except UserError:
        if path.exists():
            raise
        return None  # a Hub dataset without the split


def parse_row_filter(conditions: Sequence[str]) -> dict[str, set[str]]:
    """``["source=imdb", "source=web"]`` -> ``{"source": {"imdb", "web"}}``: column -> the values it may hold."""
    rules: dict[str, set[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not column or not equals:
            raise UserError(f"row_filter {condition!r} is not of the form column=value")
        rules.setdefault(column, set()).add(value)
    return rules


def filter_rows(dataset: Any, rules: Mapping[str, set[str]], name: str = "dataset") -> Any:
    """The rows whose columns hold one of the values allowed (compared as text); rules on absent columns do nothing.

    Raises:
        UserError: no row is left.
    """
    present = first_row(dataset) or {}
    for column, allowed in rules.items():
        if column in present:
            dataset = dataset.filter(lambda value, allowed=allowed: str(value) in allowed, input_columns=[column])
    if first_row(dataset) is None:
        wanted = ", ".join(f"{column} in {sorted(allowed)}" for column, allowed in rules.items())
        raise UserError(f"{name} has no row with {wanted}; change --row_filter")
    return dataset


def _require_filtered_columns(parts: Sequence[Any], rules: Mapping[str, set[str]]) -> None:
    for column in rules:
        if not any(has_columns(part, column) for part in parts):
            present = ", ".join(first_row(parts[0]) or {})
            raise UserError(f"row_filter names the column {column}, but the dataset has {present}")


def _joined(parts: Sequence[Any]) -> Any:
    """The parts one after the other, in the columns that they share."""
    if len(parts) == 1:
        return parts[0]
    from datasets import concatenate_datasets

    rows = [first_row(part) or {} for part in parts]
    common = [column for column in rows[0] if all(column in row for row in rows)]
    if not common:
        raise UserError(f"the datasets share no column ({'; '.join(', '.join(row) for row in rows)}); rename them")
    try:
        return concatenate_datasets([part.select_columns(common) for part in parts])
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the datasets hold different types in {', '.join(common)}: {reason}") from None


def _first(dataset: Any, count: int | None) -> Any:
    """The first `count` rows, or all."""
    if count is None:
        return dataset
    if count < 1:
        raise UserError(f"a limit of {count} samples leaves no rows; give at least 1")
    return dataset.take(count) if _streams(dataset) else dataset.select(range(min(count, len(dataset))))


def _in_memory(dataset: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(dataset)) if _streams(dataset) else dataset


def _streams(dataset: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def first_row(dataset: Any) -> dict[str, Any] | None:
    """The first row, or None where there is none."""
    return next(iter(dataset), None)


def has_columns(dataset: Any, *columns: str) -> bool:
    row = first_row(dataset)
    return row is not None and all(column in row for column in columns)


def require_columns(dataset: Any, *choices: Sequence[str], role: str = "dataset") -> Sequence[str]:
    """The first of `choices` (each a set of column names) that the dataset has.

    Raises:
        UserError: it has none of them; names the columns that there are.
    """
    for columns in choices:
        if has_columns(dataset, *columns):
            return columns
    wanted = " or ".join("+".join(columns) for columns in choices)
    present = ", ".join(first_row(dataset) or {})
    raise UserError(f"{role} needs the columns {wanted}, but has {present}; rename them or give another dataset")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON Lines atomically."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _has_file_ending(path: Path) -> bool:
    """A dot in the name of a repo is none."""
    return any(suffix in BUILDERS or suffix == ".gz" for suffix in path.suffixes)


def _builder_of(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    builder = BUILDERS.get(suffixes[-1]) if suffixes else None
    if builder is None:
        raise UserError(f"data file {path} has no known ending; rename it to one of {', '.join(BUILDERS)} (also .gz)")
    return builder


def data_splits(folder: Path) -> dict[str, list[Path]]:
    """The data files of each split that the folder holds; a report or a card is none."""
    places = [folder, folder / "data"]
    files = [file for place in places if place.is_dir() for file in sorted(place.iterdir()) if file.is_file()]
    splits: dict[str, list[Path]] = {}
    for file in files:
        known = any(suffix in BUILDERS for suffix in file.suffixes)
        if known and not file.name.startswith(".") and file.name != "metrics.json":
            splits.setdefault(SHARD.sub("", file.name.split(".")[0]), []).append(file)
    return splits


def _split_files(folder: Path, split: str) -> list[Path]:
    splits = data_splits(folder)
    if split not in splits:
        there = ", ".join(splits) or "no data files"
        raise UserError(f"dataset folder {folder} has no split {split!r} (it has {there}); name one of them")
    return splits[split]


def _load(files: Sequence[Path], name: str, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    builder = _builder_of(files[0])
    options: dict[str, Any] = {"sep": "\t"} if ".tsv" in files[0].suffixes else {}
    try:
        paths = [str(file) for file in files]
        with _unreported():
            dataset = load_dataset(builder, split="train", data_files=paths, streaming=streaming, **options)
        first_row(dataset)  # a stream reads its file now or never
        return dataset
    except StopIteration:  # how the JSON reader says that the file is empty
        raise UserError(f"dataset {name} has no rows; give another file") from None
    except (DatasetGenerationError, OSError, ValueError, UnicodeDecodeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"dataset {name} cannot be read as {builder}: {reason}; mend or replace the file") from None


@contextmanager
def _unreported() -> Iterator[None]:
    """For the time, datasets does not tell a server what it reads, local files included, unless it is asked to."""
    from datasets import config

    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = before and os.environ.get("HF_UPDATE_DOWNLOAD_COUNTS", "0") != "0"
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _from_hub(name: str, config: str | None, split: str, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    if name.startswith((".", "/", "~")) or name.count("/") > 1 or _has_file_ending(Path(name)):
        raise UserError(f"dataset {name}: no such file or folder")
    try:
        with _unreported():
            return load_dataset(name, config, split=split, streaming=streaming)
    except (OfflineModeIsEnabled, ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        reason = "the Hub cannot be asked while HF_HUB_OFFLINE=1" if _offline() else str(error).strip().splitlines()[0]
        raise UserError(
            f"dataset {name} is no local file or folder, and as a Hub id it cannot be fetched: {reason}; "
            "give a local path"
        ) from None
    except ValueError as error:
        raise UserError(f"dataset {name}: {str(error).strip().splitlines()[0]}") from None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
