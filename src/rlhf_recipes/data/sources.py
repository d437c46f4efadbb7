"""Datasets from a folder, a file or a Hub id: splits, filters, limits and required columns."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.rows import filter_rows, first_row, parse_row_filter, require_filtered_columns

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SHARD = re.compile(r"-\d+-of-\d+$")
# File ending -> builder of the datasets library; .gz may follow each ending.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_split(
    name: str,
    split: str,
    *,
    config: str | None = None,
    max_samples: int | None = None,
    streaming: bool = False,
) -> "Dataset | IterableDataset":
    """Load one split of a dataset and check that it has rows.

    Args:
        name: a folder, a data file or a Hub id. A folder has ``<split>.jsonl`` (or .csv, .parquet, ...; also .gz), or
            shards such as ``<split>-00000-of-00002.parquet``, itself or in its subfolder ``data``.
        config: name of the configuration of a Hub dataset.
        max_samples: keep only so many rows, the first ones.
        streaming: read rows as they are needed.

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
    return _first_rows(dataset, max_samples)


def load_train_and_test(
    arguments: DatasetArguments, name: str | None = None, streaming: bool = False
) -> "tuple[Any, Any | None]":
    """Load the training split and the held-out split of `arguments.dataset_name` (or `name`); None without the latter.

    `arguments.row_filter` applies to both splits. `arguments.extra_dataset_names` add rows to the training split. The
    limits on samples count filtered rows.
    """
    train = _first_rows(_concatenated(load_training_sources(arguments, name, streaming)), arguments.max_train_samples)
    return train, load_test_split(arguments, name, streaming)


def load_test_split(arguments: DatasetArguments, name: str | None = None, streaming: bool = False) -> "Any | None":
    """Load the held-out split of `arguments.dataset_name` (or `name`), filtered and limited; None if there is none.

    streaming: read a Hub dataset as a stream, since otherwise the Hub sends every split to whoever requests one. The
    filtered rows are in memory.
    """
    source = str(name or arguments.dataset_name)
    test = _load_test(arguments, source, streaming)
    if test is None:
        return None
    rules = parse_row_filter(arguments.row_filter or [])
    test = filter_rows(test, rules, f"{source} ({arguments.dataset_test_split})")
    return _in_memory(_first_rows(test, arguments.max_test_samples))


def load_training_sources(arguments: DatasetArguments, name: str | None = None, streaming: bool = False) -> list[Any]:
    """Load the filtered training split of each source: `dataset_name` (or `name`) first, then the extra ones.

    Raises:
        UserError: no source, or a filtered column that no source has; see also `load_split` and `filter_rows`.
    """
    source = name or arguments.dataset_name
    if not source:
        raise UserError("no dataset; pass --dataset_name with a folder, a data file or a Hub id")
    sources = [source, *(arguments.extra_dataset_names or [])]
    rules = parse_row_filter(arguments.row_filter or [])
    split, config = arguments.dataset_train_split, arguments.dataset_config
    datasets = [load_split(source, split, config=config, streaming=streaming) for source in sources]
    require_filtered_columns(datasets, rules)
    return [
        filter_rows(dataset, rules, f"{source} ({split})") for dataset, source in zip(datasets, sources, strict=True)
    ]


def _load_test(arguments: DatasetArguments, source: str, streaming: bool) -> "Any | None":
    path = Path(source).expanduser()
    split = arguments.dataset_test_split
    if path.is_file() or (path.is_dir() and split not in data_splits(path)):
        return None
    try:
        streaming = streaming and not path.exists()
        return load_split(source, split, config=arguments.dataset_config, streaming=streaming)
    except UserError:
        if path.exists():
            raise
        return None  # a Hub dataset without the split


def _concatenated(datasets: Sequence[Any]) -> Any:
    """Return the datasets one after the other, with the columns that all of them have."""
    if len(datasets) == 1:
        return datasets[0]
    from datasets import concatenate_datasets

    rows = [first_row(dataset) or {} for dataset in datasets]
    common = [column for column in rows[0] if all(column in row for row in rows)]
    if not common:
        raise UserError(f"the datasets share no column ({'; '.join(', '.join(row) for row in rows)}); rename them")
    try:
        return concatenate_datasets([dataset.select_columns(common) for dataset in datasets])
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the datasets hold different types in {', '.join(common)}: {reason}; give the columns one type"
        ) from None


def _first_rows(dataset: Any, count: int | None) -> Any:
    """Return the first `count` rows; None: all."""
    if count is None:
        return dataset
    if count < 1:
        raise UserError(f"a limit of {count} samples leaves no rows; give at least 1")
    return dataset.take(count) if _is_stream(dataset) else dataset.select(range(min(count, len(dataset))))


def _in_memory(dataset: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(dataset)) if _is_stream(dataset) else dataset


def _is_stream(dataset: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def _has_file_ending(path: Path) -> bool:
    """Whether the name ends as a data file does. Other dots may be part of a repo's name."""
    return any(suffix in BUILDERS or suffix == ".gz" for suffix in path.suffixes)


def _builder_of(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    builder = BUILDERS.get(suffixes[-1]) if suffixes else None
    if builder is None:
        raise UserError(f"data file {path} has no known ending; rename it to one of {', '.join(BUILDERS)} (also .gz)")
    return builder


def data_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of each split in a dataset folder; metrics.json and hidden files do not count."""
    folders = [folder, folder / "data"]
    files = [file for path in folders if path.is_dir() for file in sorted(path.iterdir()) if file.is_file()]
    splits: dict[str, list[Path]] = {}
    for file in files:
        known = any(suffix in BUILDERS for suffix in file.suffixes)
        if known and not file.name.startswith(".") and file.name != "metrics.json":
            splits.setdefault(SHARD.sub("", file.name.split(".")[0]), []).append(file)
    return splits


def _split_files(folder: Path, split: str) -> list[Path]:
    splits = data_splits(folder)
    if split not in splits:
        present = ", ".join(splits) or "no data files"
        raise UserError(f"dataset folder {folder} has no split {split!r} (it has {present}); name one of them")
    return splits[split]


def _load(files: Sequence[Path], name: str, streaming: bool) -> Any:
    """Load local files as one dataset; `name` is what messages call it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    builder = _builder_of(files[0])
    options: dict[str, Any] = {"sep": "\t"} if ".tsv" in files[0].suffixes else {}
    try:
        paths = [str(file) for file in files]
        with _without_download_counts():
            dataset = load_dataset(builder, split="train", data_files=paths, streaming=streaming, **options)
        first_row(dataset)  # a stream opens its file here, so errors are caught here
        return dataset
    except StopIteration:  # raised by the JSON reader for an empty file
        raise UserError(f"dataset {name} has no rows; give another file") from None
    except (DatasetGenerationError, OSError, ValueError, UnicodeDecodeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"dataset {name} cannot be read as {builder}: {reason}; fix or replace the file") from None


@contextmanager
def _without_download_counts() -> Iterator[None]:
    """Within this block `datasets` reports no loads, not even of local files, to a server.

    ``HF_UPDATE_DOWNLOAD_COUNTS=1`` in the environment keeps the reports.
    """
    from datasets import config

    setting = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = setting and os.environ.get("HF_UPDATE_DOWNLOAD_COUNTS", "0") != "0"
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = setting


def _from_hub(name: str, config: str | None, split: str, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    if name.startswith((".", "/", "~")) or name.count("/") > 1 or _has_file_ending(Path(name)):
        raise UserError(f"dataset {name}: no such file or folder; check the path")
    try:
        with _without_download_counts():
            return load_dataset(name, config, split=split, streaming=streaming)
    except (OfflineModeIsEnabled, ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        reason = "HF_HUB_OFFLINE=1 allows no request to the Hub" if _offline() else str(error).strip().splitlines()[0]
        raise UserError(
            f"dataset {name} is no local file or folder, and as a Hub id it cannot be fetched: {reason}; "
            "give a local path"
        ) from None
    except ValueError as error:
        raise UserError(f"dataset {name}: {str(error).strip().splitlines()[0]}") from None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
