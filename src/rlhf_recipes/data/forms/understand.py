"""One source understood: its format, its columns, and its rows in canonical form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import ReadingArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms.context import TEMPLATE_COLUMNS, Context
from rlhf_recipes.data.forms.converters import row_converter
from rlhf_recipes.data.forms.endings import foreign_ends, without_foreign_ends
from rlhf_recipes.data.forms.formats import (
    BEFORE_ANSWER,
    COMPLETION,
    MESSAGES,
    PREFERENCE,
    PROMPT,
    TEXT,
    Format,
    choose_format,
    columns_of,
    columns_of_other_stages,
)  # fmt: skip
from rlhf_recipes.data.forms.leftover import check_leftover
from rlhf_recipes.data.forms.meanings import NAMES, assign_meanings, plain_name
from rlhf_recipes.data.forms.messages import holds_messages, parse_roles
from rlhf_recipes.data.forms.misfits import SAID, as_requested, misfit_hints, refuse_misfits
from rlhf_recipes.data.forms.options import FormOptions
from rlhf_recipes.data.forms.survey import STREAM_ROWS, Column, survey
from rlhf_recipes.data.forms.transcripts import is_transcript
from rlhf_recipes.data.reading import Source

if TYPE_CHECKING:
    pass

Row = dict[str, Any]
# Names that say that a row is an instruction and its answer, so a turn of a chat and not a text to continue.
INSTRUCTIONS = {"instruction", "instructions", "question", "query", "problem", "input", "user_input"}
CONTENT = ("prompt", "completion", "chosen", "rejected", "answer_a", "answer_b", "messages", "answers", "text")


@dataclass(frozen=True)
class Understood:
    """A source with what its columns mean.

    form: of its rows. chat: prompts and answers are messages. fields: canonical column -> text, messages, ids, label,
    number or json. convert: (row, index) -> canonical rows. description: one line for the log. kept: the other columns,
    with what they hold.
    """

    source: Source
    form: str
    chat: bool
    fields: Mapping[str, str]
    convert: Callable[[Row, int], Iterator[Row]]
    description: str
    kept: Mapping[str, Column]
    counts: RowCounts
    ends: tuple[tuple[str, ...], tuple[str, ...]]
    template_values: Callable[[Row], dict[str, Any]]

    def __iter__(self) -> Iterator[Row]:
        for index, row in enumerate(self.source):
            self.counts["read"] += 1
            yield from without_foreign_ends(self.convert(row, index), self.ends, self.counts)


def understand(
    source: Source,
    arguments: ReadingArguments,
    options: FormOptions,
    filtered: Sequence[str],
    requested: Mapping[str, str],
    counts: RowCounts,
    streaming: bool = False,
) -> Understood:
    """Return a source with its format decided and every column accounted for.

    Args:
        filtered: columns by which rows were selected, so that nothing need read them.
        requested: meaning -> column of `arguments.columns` that this source has.
        counts: what is dropped and why; filled as the rows are converted.
        streaming: look at the first rows only.

    Raises:
        UserError: no format fits or two do, a column that carries meaning would be left out.
    """
    source, ignored = _without_columns(source, arguments.ignore_columns or [])
    dotted = [name for name in (*requested.values(), *NAMES["prompt"]) if "." in name]
    facts = survey(source, dotted, STREAM_ROWS if streaming else None)
    by_meaning = {ours: theirs for ours, theirs in requested.items() if ours not in options.columns}
    facts = as_requested(facts, by_meaning)
    kinds = {name: column.kind for name, column in facts.items()}
    meanings = assign_meanings(list(facts), kinds, requested, ignored, source.name)
    refuse_misfits(facts, requested, source.name)
    first = options.any_text or options.forms[0] == PROMPT
    wanted = (options.forms, arguments.dataset_format, source.name, _shown_columns(source, facts))
    shape = choose_format(
        meanings, *wanted, first=first, text_prompts=options.text_prompts, hints=misfit_hints(facts, meanings)
    )
    shape = shape if options.margin else replace(shape, uses=tuple(use for use in shape.uses if use != "margin"))
    columns = _with_values(columns_of(shape, meanings), shape, facts)
    chat = _is_chat(columns, facts, arguments.as_chat, source.name)
    separated = _is_instruction(columns)
    written = SAID & set(by_meaning)
    context = Context(source.name, columns, chat, parse_roles(arguments.roles), counts, separated, written)
    form = PROMPT if options.forms[0] == PROMPT else shape.form
    keeps = options.keep_columns or form == PROMPT
    accounted = keeps or options.any_text
    used = {name.split(".")[0] for name in columns.values()}
    left = {name: column for name, column in facts.items() if name in source.columns and name not in used}
    elsewhere = columns_of_other_stages(shape, meanings) if form != PREFERENCE or "prompt" in columns else set()
    unread = {name: column for name, column in left.items() if name not in filtered and name not in elsewhere}
    check_leftover(form, unread, meanings, source.name, kept=accounted, taught=COMPLETION in options.forms)
    convert_row, form, notes = row_converter(shape, form, context, facts, source, arguments, options)
    kept: dict[str, Column] = {}
    if keeps:
        no_images = {name for name in source.columns if name in NAMES["images"]}  # all of their values are empty
        kept = {name: facts[name] for name in source.columns if not (name in no_images or _is_consumed(name, columns))}
        convert_row = partial(_with_kept, convert_row, list(kept))
    fields = _fields(shape, form, context, facts, options)
    read = _prompt_columns(columns) if form == PROMPT else columns
    others = [name for name in (kept if keeps else left) if name not in read.values()]
    line = _description(form, read, notes, ignored, others, keeps)
    ends = foreign_ends(options.tokenizer)
    return Understood(source, form, chat, fields, convert_row, line, kept, counts, ends, context.template_values)


def _fields(
    shape: Format, form: str, context: Context, facts: Mapping[str, Column], options: FormOptions
) -> dict[str, str]:
    """Return what each canonical column holds: text, messages, ids, label, number or json."""
    columns, said = context.columns, "messages" if context.chat else "text"
    sample = facts[columns["prompt"]].sample if "prompt" in columns else None
    if form == PROMPT:
        ids = "input_ids" in columns or (isinstance(sample, (list, tuple)) and not holds_messages(sample))
        from_messages = "prompt" not in columns and "messages" in columns
        fields = {"prompt": "ids" if ids else "messages" if from_messages else "text" if shape.form == TEXT else said}
    elif form == TEXT:
        fields = {"text": "text"}
    elif form == MESSAGES:
        fields = {"messages": "messages"}
    elif form == COMPLETION:
        fields = {"prompt": said, "completion": said}
    elif form == PREFERENCE:
        fields = {"prompt": said, "chosen": said, "rejected": said}
        if "margin" in columns or (options.score_margin and shape.name == "ranked"):
            fields["margin"] = "number"
    elif "completion" in columns:
        fields = {"prompt": said, "completion": said, "label": "label"}
    else:
        content = "messages" in columns or "messages" in facts[columns["text"]].kinds
        fields = {"messages": "messages", "label": "label"} if content else {"text": "text", "label": "label"}
    for name in TEMPLATE_COLUMNS:
        if name in columns or (name == "tools" and isinstance(sample, Mapping) and sample.get("tools")):
            fields[name] = "json"
    return fields


def _without_columns(source: Source, names: Sequence[str]) -> tuple[Source, list[str]]:
    """Return the source without the named columns that it has, and their names."""
    ignored = [name for name in names if name in source.columns]
    if not ignored:
        return source, []
    left_out, read = set(ignored), source.read

    def rows() -> Iterator[Row]:
        for row in read():
            yield {name: value for name, value in row.items() if name not in left_out}

    columns = tuple(name for name in source.columns if name not in left_out)
    return replace(source, read=rows, columns=columns), ignored


def _with_values(columns: dict[str, str], shape: Format, facts: Mapping[str, Column]) -> dict[str, str]:
    """Return the columns without the optional ones that are blank in every row, such as an empty `system`."""
    return {
        meaning: name for meaning, name in columns.items() if meaning in shape.needs or not facts[name].is_blank
    }  # fmt: skip


def _is_chat(columns: Mapping[str, str], facts: Mapping[str, Column], as_chat: bool | None, name: str) -> bool:
    content = [facts[columns[meaning]] for meaning in CONTENT if meaning in columns]
    has_messages = any("messages" in column.kinds or _lists_messages(column.sample) for column in content)
    if as_chat is False and has_messages:
        raise UserError(f"{name} holds messages, which --as_chat false cannot make text of; leave it out")
    if as_chat is not None:
        return as_chat
    beside = any(meaning in columns for meaning in ("system", "history", *TEMPLATE_COLUMNS))
    transcripts = any(is_transcript(column.sample) for column in content) and "text" not in columns
    return has_messages or beside or transcripts or _is_instruction(columns)


def _shown_columns(source: Source, facts: Mapping[str, Column]) -> list[str]:
    """Return the columns as an error lists them, objects with the paths to what they hold."""
    shown = []
    for name in source.columns:
        sample = facts[name].sample
        paths = [f"{name}.{key}" for key in sample][:6] if isinstance(sample, Mapping) else []
        shown.append(f"{name} ({', '.join(paths)})" if paths else name)
    return shown


def _is_instruction(columns: Mapping[str, str]) -> bool:
    return plain_name(columns.get("prompt", "")) in INSTRUCTIONS


def _lists_messages(sample: Any) -> bool:
    return isinstance(sample, (list, tuple)) and bool(sample) and holds_messages(sample[0])


def _is_consumed(name: str, columns: Mapping[str, str]) -> bool:
    """Return whether a column stands in the canonical row, and so is not passed on beside it."""
    own = {"prompt", "text", "input_ids", *TEMPLATE_COLUMNS}
    return name in own or any(column == name and meaning in own for meaning, column in columns.items())


def _with_kept(
    convert_row: Callable[[Row, int], Iterator[Row]], kept: list[str], row: Row, index: int
) -> Iterator[Row]:
    for each in convert_row(row, index):
        yield {name: row.get(name) for name in kept if name not in each} | each


def _prompt_columns(columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of which a prompt is made."""
    source = next(
        (names for names in (("input_ids",), ("prompt",), ("messages",), ("chosen", "rejected"), ("text",))
         if names[0] in columns), (),
    )  # fmt: skip
    return {meaning: name for meaning, name in columns.items() if meaning in (*source, *BEFORE_ANSWER)}


def _description(
    form: str, columns: Mapping[str, str], notes: Sequence[str], ignored: Sequence[str], others: Sequence[str],
    kept: bool,
) -> str:  # fmt: skip
    """Return how a source was understood: ``preference: question -> prompt, chosen, rejected; not used: id``."""
    read = [name if name == meaning else f"{name} -> {meaning}" for meaning, name in columns.items()]
    parts = [f"{form}: {', '.join(read)}", *notes]
    if others:
        parts.append(f"{'passed on' if kept else 'not used'}: {', '.join(others)}")
    if ignored:
        parts.append(f"ignored: {', '.join(ignored)}")
    return "; ".join(parts)
