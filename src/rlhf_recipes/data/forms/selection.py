"""Which rows a stage reads: its sources opened, filtered, limited and understood."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from rlhf_recipes.core.arguments import DatasetArguments, ReadingArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import log_line
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms.formats import check_format
from rlhf_recipes.data.forms.meanings import parse_columns
from rlhf_recipes.data.forms.options import FormOptions
from rlhf_recipes.data.forms.understand import Understood, understand
from rlhf_recipes.data.reading import Source, local_path, open_source, open_test_source
from rlhf_recipes.data.rows import matches_filter, parse_row_filter

Row = dict[str, Any]


def understand_split(
    name: str,
    split: str,
    arguments: ReadingArguments,
    options: FormOptions,
    counts: RowCounts,
    config: str | None = None,
) -> Understood:
    """Return one understood split. Errors as `load_rows`."""
    check_arguments(arguments)
    source = open_source(name, split, **(_reading_options(arguments) | {"config": config}))
    columns = _requested_columns(arguments, options, [source])(source)
    understood = understand(source, arguments, options, [], columns, counts)
    log_line(f"{source.name} ({split}): {understood.description}")
    return understood


def understand_sources(
    arguments: DatasetArguments, options: FormOptions, train: RowCounts, test: RowCounts, streaming: bool = False
) -> tuple[list[Understood], list[Understood]]:
    """Return the understood sources of the training split, and that of the held-out split, if there is one.

    train, test: filled as the rows are read. Errors as `load_rows`.
    """
    check_arguments(arguments)
    names = [arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    if not names[0]:
        raise UserError("no dataset; pass --dataset_name with a folder, a data file or a Hub id")
    split, reading = arguments.dataset_train_split, _reading_options(arguments) | {"streaming": streaming}
    sources = [open_source(str(names[0]), split, **reading)]
    for name in names[1:]:  # a subset is one of the first dataset, or of a repo
        own = reading if local_path(str(name)) is None else reading | {"config": None}
        sources.append(open_source(str(name), split, **own))
    held_out = open_test_source(str(names[0]), arguments.dataset_test_split, **reading)
    if held_out is not None and held_out.name in [source.name for source in sources]:
        held_out = replace(held_out, name=f"{held_out.name} ({arguments.dataset_test_split})")
    columns = _requested_columns(arguments, options, [*sources, *([held_out] if held_out else [])])
    rules = parse_row_filter(arguments.row_filter or [])
    require_filter_columns(sources, rules)
    limits = (arguments.max_train_samples, arguments.max_test_samples)
    selected = [(_limited(_filtered(source, rules), limits[0]), train) for source in sources]
    if held_out is not None:
        selected.append((_limited(_filtered(held_out, rules), limits[1]), test))
    read = partial(understand, arguments=arguments, options=options, filtered=list(rules), streaming=streaming)
    understood = [read(source, requested=columns(source), counts=counts) for source, counts in selected]
    for each in understood[: len(sources)]:
        log_line(f"{each.source.name} ({split}): {each.description}")
    for each in understood[len(sources) :]:
        shown = each.source.name.removesuffix(f" ({arguments.dataset_test_split})")
        log_line(f"{shown} ({arguments.dataset_test_split}): {each.description}")
    return understood[: len(sources)], understood[len(sources) :]


def check_arguments(arguments: ReadingArguments) -> None:
    """Raise UserError for values that no dataset could fit."""
    check_format(arguments.dataset_format)
    parse_columns(arguments.columns)


def _reading_options(arguments: ReadingArguments) -> dict[str, Any]:
    config = {"config": arguments.dataset_config} if isinstance(arguments, DatasetArguments) else {}
    tables = {"csv_columns": arguments.csv_columns}
    return config | {"encoding": arguments.encoding, "text_by": arguments.text_by} | tables


def _requested_columns(
    arguments: ReadingArguments, options: FormOptions, sources: Sequence[Source]
) -> Callable[[Source], dict[str, str]]:
    """Return a function that gives the requested columns that a source has. Each must be in one of the sources."""
    requested = parse_columns(arguments.columns) | dict(options.columns)

    def of(source: Source) -> dict[str, str]:
        return {ours: theirs for ours, theirs in requested.items() if _has_path(source, theirs)}

    if not any(len(of(source)) == len(requested) for source in sources):
        for ours, theirs in requested.items():
            if not any(_has_path(source, theirs) for source in sources):
                raise UserError(
                    f"columns {ours}={theirs}: the dataset has no column {theirs!r} but {', '.join(sources[0].columns)}"
                )
    for name in arguments.ignore_columns or []:
        if not any(name in source.columns for source in sources):
            raise UserError(
                f"ignore_columns names {name!r}, but the dataset has {', '.join(sources[0].columns)}; leave it out"
            )
    return of


def _has_path(source: Source, path: str) -> bool:
    return path in source.columns or path.split(".")[0] in source.columns


def require_filter_columns(sources: Sequence[Source], rules: Mapping[str, set[str]]) -> None:
    """Raise UserError if a filtered column is in none of the sources."""
    for column in rules:
        if not any(column in source.columns for source in sources):
            present = ", ".join(sources[0].columns)
            raise UserError(f"row_filter names the column {column}, but the dataset has {present}; name one of these")


def _filtered(source: Source, rules: Mapping[str, set[str]]) -> Source:
    """Return the source with the rows that match; it ignores rules for columns that it does not have."""
    rules = {column: allowed for column, allowed in rules.items() if column in source.columns}
    if not rules:
        return source
    read, names = source.read, source.label_names

    def rows() -> Iterator[Row]:
        for row in read():
            if all(matches_filter(row.get(column), allowed, names.get(column)) for column, allowed in rules.items()):
                yield row

    if next(rows(), None) is None:
        conditions = ", ".join(f"{column} in {sorted(allowed)}" for column, allowed in rules.items())
        raise UserError(f"{source.name} has no row with {conditions}; change --row_filter")
    return replace(source, read=rows, length=None)


def _limited(source: Source, limit: int | None) -> Source:
    """Return the source with its first `limit` rows."""
    if limit is None:
        return source
    if limit < 1:
        raise UserError(f"a limit of {limit} samples leaves no rows; give at least 1")
    read = source.read
    return replace(source, read=lambda: islice(read(), limit), length=None)
