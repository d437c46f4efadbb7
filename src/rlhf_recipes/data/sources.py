"""Datasets from a folder, a file or a Hub id: splits, filters, limits and required columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading import (
    Source,
    UnknownSplitError,
    load_hub,
    local_path,
    open_source,
    open_test_source,
    require_no_test_split,
)
from rlhf_recipes.data.rows import filter_rows, first_row, parse_row_filter, require_filtered_columns

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def load_split(
    name: str,
    split: str,
    *,
    config: str | None = None,
    max_samples: int | None = None,
    streaming: bool = False,
    reading: Mapping[str, Any] | None = None,
) -> "Dataset | IterableDataset":
    """Load one split of a dataset and check that it has rows.

    Args:
        name: a folder, a data file or a Hub id; see `open_source`.
        config: the subset of a Hub dataset or of a folder.
        max_samples: keep only so many rows, the first ones.
        streaming: read rows as they are needed.
        reading: how files are read: the encoding, text_by and csv_columns of `open_source`.

    Raises:
        UserError: no such source or split, an unreadable or ambiguous file, an empty split, a Hub id while offline.
    """
    if local_path(name) is None:
        dataset = load_hub(name, split, config, streaming)
        if first_row(dataset) is None:
            raise UserError(f"dataset {name} has no rows in its split {split!r}; give another split or file")
        return _first_rows(dataset, max_samples)
    source = open_source(name, split, config=config, streaming=streaming, **(reading or {}))
    return _first_rows(_dataset_of(source, streaming), max_samples)


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
    split, reading = arguments.dataset_train_split, _reading(arguments)
    datasets = [
        load_split(source, split, config=_subset(source, arguments), streaming=streaming, reading=reading)
        for source in sources
    ]
    require_filtered_columns(datasets, rules)
    return [
        filter_rows(dataset, rules, f"{source} ({split})") for dataset, source in zip(datasets, sources, strict=True)
    ]


def _load_test(arguments: DatasetArguments, source: str, streaming: bool) -> "Any | None":
    config, split = arguments.dataset_config, arguments.dataset_test_split
    if local_path(source) is not None:
        test = open_test_source(source, split, config=config, **_reading(arguments))
        return None if test is None else _dataset_of(test, streaming=False)
    try:
        return load_split(source, split, config=config, streaming=streaming)
    except UnknownSplitError as error:
        require_no_test_split(source, split, error.available)
        return None


def _reading(arguments: DatasetArguments) -> dict[str, Any]:
    """Return how the arguments say that files are read."""
    return {"encoding": arguments.encoding, "text_by": arguments.text_by, "csv_columns": arguments.csv_columns}


def _subset(source: str, arguments: DatasetArguments) -> str | None:
    """Return the subset to read; that of --dataset_config is not required of further files and folders."""
    is_further = source != arguments.dataset_name and source in (arguments.extra_dataset_names or [])
    return None if is_further and local_path(source) is not None else arguments.dataset_config


def _dataset_of(source: Source, streaming: bool) -> Any:
    """Return a source's rows as a dataset; keys that a row lacks are None, columns of mixed types become JSON."""
    from datasets import Dataset, IterableDataset

    if streaming:
        return IterableDataset.from_generator(source.read)
    columns: dict[str, list[Any]] = {name: [] for name in source.columns}
    for row in source:
        for name, values in columns.items():
            values.append(row.get(name))
    return Dataset.from_dict(columns, on_mixed_types="use_json")


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
