"""The one door for data: from the arguments of a stage to canonical rows with counts of what happened to them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from rlhf_recipes.core.arguments import DatasetArguments, ReadingArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import log_line
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms.convert import as_conversation
from rlhf_recipes.data.forms.formats import COMPLETION, MESSAGES, PREFERENCE, PROMPT, check_format
from rlhf_recipes.data.forms.meanings import parse_columns
from rlhf_recipes.data.forms.options import FormOptions
from rlhf_recipes.data.forms.store import canonical_features, store_rows, stream_rows
from rlhf_recipes.data.forms.understand import Understood, understand
from rlhf_recipes.data.reading import Source, open_source, open_test_source
from rlhf_recipes.data.rows import matches_filter, parse_row_filter

Row = dict[str, Any]
TRAIN, TEST = "the training split", "the held-out split"
REASONS = {
    "empty_rows": "are empty and are dropped",
    "empty_answers": "have an empty answer and are dropped",
    "empty_prompts": "have no prompt and are dropped",
    "without_label": "have no label and are dropped",
    "ties": "pairs are ties and are dropped",
    "foreign_ends": "end with the end token of another model (such as </s>), which is taken away",
    "unequal_prompts": "compare answers to different prompts and are dropped",
}


@dataclass
class LoadedRows:
    """Canonical rows of a dataset.

    form: text, messages, prompt_completion, preference, label or prompt. chat: prompts and answers are messages.
    train, test: datasets of canonical columns; test is None without a held-out split. counts: by split.
    """

    form: str
    chat: bool
    train: Any
    test: Any | None
    counts: dict[str, RowCounts] = field(default_factory=dict)


def load_rows(arguments: DatasetArguments, options: FormOptions, *, streaming: bool = False) -> LoadedRows:
    """Load the training split, with the extra datasets, and the held-out split of a stage's arguments.

    Raises:
        UserError: no dataset, a source that cannot be read or understood, sources of different forms, no rows left.
    """
    check_arguments(arguments)
    names = [arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    if not names[0]:
        raise UserError("no dataset; pass --dataset_name with a folder, a data file or a Hub id")
    split, reading = arguments.dataset_train_split, _reading_options(arguments) | {"streaming": streaming}
    sources = [open_source(str(name), split, **reading) for name in names]
    test = open_test_source(str(names[0]), arguments.dataset_test_split, **reading)
    columns = _requested_columns(arguments, [*sources, *([test] if test else [])])
    rules = parse_row_filter(arguments.row_filter or [])
    require_filter_columns(sources, rules)
    train_counts, test_counts = RowCounts(TRAIN), RowCounts(TEST)
    limit = arguments.max_train_samples
    selected = [_limited(_filtered(source, rules), limit) for source in sources]
    read = partial(understand, arguments=arguments, options=options, filtered=list(rules), streaming=streaming)
    understood = [read(each, requested=columns(each), counts=train_counts) for each in selected]
    held_out: list[Understood] = []
    if test is not None:
        chosen = _limited(_filtered(test, rules), arguments.max_test_samples)
        held_out = [read(chosen, requested=columns(chosen), counts=test_counts)]
    for each in [*understood, *held_out]:
        log_line(f"{each.source.name}: {each.description}")
    form, chat = _common_form([*understood, *held_out])
    if arguments.as_chat is None:
        _tell_of_plain_text(form, chat, options)
    train = _stored(understood, form, train_counts, streaming, limit)
    stored_test = _stored(held_out, form, test_counts, False) if held_out else None
    if form == PREFERENCE:
        _require_same_prompts(train, stored_test)
    counts = {"train": train_counts} | ({"test": test_counts} if held_out else {})
    return LoadedRows(form, chat, train, stored_test, counts)


def load_split_rows(
    name: str, split: str, arguments: ReadingArguments, options: FormOptions, *, config: str | None = None
) -> LoadedRows:
    """Load one split, in `train`. Errors as `load_rows`."""
    check_arguments(arguments)
    source = open_source(name, split, config=config, **_reading_options(arguments))
    counts = RowCounts(source.name)
    columns = _requested_columns(arguments, [source])(source)
    understood = understand(source, arguments, options, [], columns, counts)
    log_line(f"{source.name}: {understood.description}")
    rows = _stored([understood], understood.form, counts, False)
    return LoadedRows(understood.form, understood.chat, rows, None, {"train": counts})


def check_arguments(arguments: ReadingArguments) -> None:
    """Raise UserError for values that no dataset could fit."""
    check_format(arguments.dataset_format)
    parse_columns(arguments.columns)


def _reading_options(arguments: ReadingArguments) -> dict[str, Any]:
    config = {"config": arguments.dataset_config} if isinstance(arguments, DatasetArguments) else {}
    return config | {"encoding": arguments.encoding, "text_by": arguments.text_by}


def _requested_columns(arguments: ReadingArguments, sources: Sequence[Source]) -> Callable[[Source], dict[str, str]]:
    """Return a function that gives the requested columns that a source has. Each must be in one of the sources."""
    requested = parse_columns(arguments.columns)

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


def _common_form(sources: Sequence[Understood]) -> tuple[str, bool]:
    """Return the form that all sources have, or are turned into, and whether it is chat.

    Raises:
        UserError: they differ; names two of them and the flag.
    """
    first = sources[0]
    forms = {each.form for each in sources}
    chats = {each.chat for each in sources}
    if forms == {COMPLETION, MESSAGES} and chats == {True}:
        return MESSAGES, True
    for each in sources[1:]:
        if each.form != first.form:
            raise UserError(
                f"{first.source.name} holds {first.form} and {each.source.name} holds {each.form}; train on one after the "
                "other, or say what the columns mean with --columns and --dataset_format"
            )
        if each.chat != first.chat:
            chat, text = (first, each) if first.chat else (each, first)
            raise UserError(
                f"{chat.source.name} holds turns of a chat and {text.source.name} plain text; pass --as_chat true to make "
                "turns of both"
            )
    return first.form, first.chat


def _stored(
    sources: Sequence[Understood], form: str, counts: RowCounts, streaming: bool, limit: int | None = None
) -> Any:
    """Return the canonical rows of all sources, one after the other, and fill in their counts."""

    def rows() -> Iterator[Row]:
        for source in sources:
            for row in source:
                yield as_conversation(row) if form == MESSAGES and "completion" in row else row

    features = canonical_features(form, sources)
    if streaming:
        return stream_rows(lambda: islice(rows(), limit), features)
    counts.clear()  # looking at the rows has counted some
    dataset = store_rows(lambda: islice(rows(), limit), features)
    dropped = [(kind, message) for kind, message in REASONS.items() if counts[kind]]
    if dataset is None:
        reasons = "; ".join(f"{counts[kind]} {message}" for kind, message in dropped)
        raise UserError(f"{sources[0].source.name} has no rows left: {reasons or 'it is empty'}; give another dataset")
    counts["used"] = len(dataset)
    for kind, message in dropped:
        counts.report(kind, counts.pop(kind), message)
    return dataset


def _tell_of_plain_text(form: str, chat: bool, options: FormOptions) -> None:
    """Say that prompts and answers stay plain text beside a tokenizer that has a chat template."""
    if not chat and form in (COMPLETION, PREFERENCE, PROMPT) and getattr(options.tokenizer, "chat_template", None):
        log_line(
            "prompts and answers stay plain text, without the chat template of the model; pass --as_chat true to make them "
            "turns"
        )


def _require_same_prompts(train: Any, test: Any | None) -> None:
    """Refuse preferences of which some rows have a prompt and others none: the model would read two kinds of rows.

    Raises:
        UserError: counts both kinds.
    """
    for name, rows in ((TRAIN, train), (TEST, test)):
        if rows is not None:
            empty = sum(not prompt for prompt in rows["prompt"])
            if 0 < empty < len(rows):
                raise UserError(
                    f"{name}: {empty} of {len(rows)} pairs have no prompt and the others have one; train on one kind, or "
                    "say which column is the prompt with --columns prompt=NAME"
                )
    if test is not None and bool(train[0]["prompt"]) != bool(test[0]["prompt"]):
        first, second = (TRAIN, TEST) if train[0]["prompt"] else (TEST, TRAIN)
        raise UserError(
            f"{first} has prompts and {second} has none, so they are not of one kind; add the prompts, or pass "
            "--ignore_columns prompt"
        )
