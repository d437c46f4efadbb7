"""One source understood: its format, its columns, and its rows in canonical form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import ReadingArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms import convert, pairs
from rlhf_recipes.data.forms.context import TEMPLATE_COLUMNS, Context
from rlhf_recipes.data.forms.endings import foreign_ends, without_foreign_ends
from rlhf_recipes.data.forms.formats import (
    COMPLETION,
    LABEL,
    MESSAGES,
    PREFERENCE,
    PROMPT,
    TEXT,
    Format,
    choose_format,
    columns_of,
)  # fmt: skip
from rlhf_recipes.data.forms.labels import LabelReader
from rlhf_recipes.data.forms.leftover import check_leftover
from rlhf_recipes.data.forms.meanings import NAMES, assign_meanings
from rlhf_recipes.data.forms.messages import holds_messages, parse_roles
from rlhf_recipes.data.forms.survey import STREAM_ROWS, Column, survey
from rlhf_recipes.data.forms.transcripts import dialogue_messages, is_transcript
from rlhf_recipes.data.reading import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
# Names that say that a row is an instruction and its answer, so a turn of a chat and not a text to continue.
INSTRUCTIONS = {"instruction", "instructions", "question", "query", "problem", "input", "user_input"}
SPOKEN = ("prompt", "completion", "chosen", "rejected", "answer_a", "answer_b", "messages", "answers", "text")


@dataclass(frozen=True)
class FormOptions:
    """How rows are turned into canonical ones.

    forms: what the stage reads, the preferred form first. keep_columns: other columns stay beside the canonical ones.
    positive_label, label_threshold: which labels are good. margin: the stage learns from a column `margin`.
    score_margin: differences of scores become margins. tokenizer: the model's; end tokens of others are taken away.
    """

    forms: tuple[str, ...]
    keep_columns: bool = False
    positive_label: Sequence[str] | None = None
    label_threshold: float | None = None
    margin: bool = False
    score_margin: bool = False
    tokenizer: "PreTrainedTokenizerBase | None" = None


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
    ignored = [name for name in arguments.ignore_columns or [] if name in source.columns]
    source = _without_columns(source, ignored)
    dotted = [name for name in (*requested.values(), *NAMES["prompt"]) if "." in name]
    facts = survey(source, dotted, STREAM_ROWS if streaming else None)
    kinds = {name: column.kind for name, column in facts.items()}
    meanings = assign_meanings(list(facts), kinds, requested, ignored, source.name)
    shape = choose_format(meanings, options.forms, arguments.dataset_format, source.name, list(source.columns))
    shape = shape if options.margin else replace(shape, uses=tuple(use for use in shape.uses if use != "margin"))
    columns = _with_values(columns_of(shape, meanings), shape, facts)
    chat = _is_chat(columns, facts, arguments.as_chat, source.name)
    separated = columns.get("prompt") in INSTRUCTIONS
    context = Context(source.name, columns, chat, parse_roles(arguments.roles), counts, separated)
    form = PROMPT if options.forms[0] == PROMPT else shape.form
    keeps = options.keep_columns or form == PROMPT
    used = {name.split(".")[0] for name in columns.values()}
    left = {name: column for name, column in facts.items() if name in source.columns and name not in used}
    unread = {name: column for name, column in left.items() if name not in filtered}
    check_leftover(form, unread, meanings, source.name, kept=keeps)
    convert_row, form, notes = _converter(shape, form, context, facts, source, arguments, options)
    kept: dict[str, Column] = {}
    if keeps:
        no_image = {name for name in (meanings.get("images"),) if name}  # all of its values are empty
        kept = {
            name: facts[name] for name in source.columns if name not in no_image and not _is_consumed(name, columns)
        }
        convert_row = partial(_with_kept, convert_row, list(kept))
    fields = _fields(shape, form, context, facts, options)
    line = _description(form, columns, notes, ignored, left, keeps)
    ends = foreign_ends(options.tokenizer)
    return Understood(source, form, chat, fields, convert_row, line, kept, counts, ends)


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
        spoken = "messages" in columns or "messages" in facts[columns["text"]].kinds
        fields = {"messages": "messages", "label": "label"} if spoken else {"text": "text", "label": "label"}
    for name in TEMPLATE_COLUMNS:
        if name in columns or (name == "tools" and isinstance(sample, Mapping) and sample.get("tools")):
            fields[name] = "json"
    return fields


def _without_columns(source: Source, ignored: Sequence[str]) -> Source:
    if not ignored:
        return source
    left_out, read = set(ignored), source.read

    def rows() -> Iterator[Row]:
        for row in read():
            yield {name: value for name, value in row.items() if name not in left_out}

    return replace(source, read=rows, columns=tuple(name for name in source.columns if name not in left_out))


def _with_values(columns: dict[str, str], shape: Format, facts: Mapping[str, Column]) -> dict[str, str]:
    """Return the columns without the optional ones that are blank in every row, such as an empty `system`."""
    return {
        meaning: name for meaning, name in columns.items() if meaning in shape.needs or not facts[name].is_blank
    }  # fmt: skip


def _is_chat(columns: Mapping[str, str], facts: Mapping[str, Column], as_chat: bool | None, name: str) -> bool:
    spoken = [facts[columns[meaning]] for meaning in SPOKEN if meaning in columns]
    has_messages = any("messages" in column.kinds or _lists_messages(column.sample) for column in spoken)
    if as_chat is False and has_messages:
        raise UserError(f"{name} holds messages, which --as_chat false cannot make text of; leave it out")
    if as_chat is not None:
        return as_chat
    beside = any(meaning in columns for meaning in ("system", "history", *TEMPLATE_COLUMNS))
    transcripts = any(is_transcript(column.sample) for column in spoken) and "text" not in columns
    return has_messages or beside or transcripts or columns.get("prompt") in INSTRUCTIONS


def _lists_messages(sample: Any) -> bool:
    return isinstance(sample, (list, tuple)) and bool(sample) and holds_messages(sample[0])


def _converter(
    shape: Format, form: str, context: Context, facts: Mapping[str, Column], source: Source,
    arguments: ReadingArguments, options: FormOptions,
) -> tuple[Callable[[Row, int], Iterator[Row]], str, list[str]]:  # fmt: skip
    """Return the function that converts a row, the form of its rows, and notes for the log."""
    if form == PROMPT:
        return partial(_prompt_rows, context, shape), form, []
    if shape.form == PREFERENCE:
        return _pair_converter(shape, context, source, arguments, options)
    if shape.form == LABEL:
        column = context.columns["label"]
        reader = LabelReader(
            column, facts[column].values, names=source.label_names.get(column), positive=options.positive_label,
            threshold=options.label_threshold, name=source.name,
        )  # fmt: skip
        return partial(_label_rows, context, reader), form, [f"labels: {reader}"]
    if shape.name == "chosen_answer":
        return partial(_chosen_rows, context), form, ["the chosen answers are learnt"]
    if shape.form == COMPLETION:
        plain = not context.chat or all(
            convert.is_one_turn(each)
            for index, row in enumerate(source)
            for each in convert.completion_rows(replace(context, counts=RowCounts("")), row, index)
        )
        if plain:
            return partial(convert.completion_rows, context), form, []
        return partial(_conversation_rows, context), MESSAGES, ["answers of several turns: loss on the assistant's"]
    if shape.form == MESSAGES:
        return partial(convert.message_rows, context), form, []
    if "messages" in facts[context.columns["text"]].kinds:
        moved = replace(context, columns={"messages": context.columns["text"]})
        return partial(convert.message_rows, moved), MESSAGES, []
    if arguments.as_chat:
        return partial(_dialogue_rows, context), MESSAGES, ["turns by their names (User:, Assistant:)"]
    return partial(convert.text_rows, context), form, []


def _pair_converter(
    shape: Format, context: Context, source: Source, arguments: ReadingArguments, options: FormOptions
) -> tuple[Callable[[Row, int], Iterator[Row]], str, list[str]]:
    if shape.name == "preference":
        repeats = not context.chat and "prompt" in context.columns and _repeats_prompt(context, source)
        notes = ["the prompt that both answers repeat is taken away"] if repeats else []
        return partial(pairs.preference_rows, context, repeats_prompt=repeats), PREFERENCE, notes
    if shape.name == "ranked":
        steps = next((name for name in source.columns if name.lower() == "labels"), None)
        if steps:
            raise UserError(
                f"{source.name}: labels of single steps (the column {steps}) are not read; give whole answers with scores"
            )
        best_first = arguments.dataset_format in ("ranked", "alpaca")
        notes = ["differences of scores are margins"] if options.score_margin else []
        ranked = partial(pairs.ranked_rows, context, best_first=best_first, with_margin=options.score_margin)
        return ranked, PREFERENCE, notes
    return partial(pairs.vote_rows, context), PREFERENCE, []


def _repeats_prompt(context: Context, source: Source) -> bool:
    """Return whether both answers begin with the prompt in every row."""
    seen = False
    for index, row in enumerate(source):
        prompt = context.prompt_text(row, index)
        answers = [context.value(row, side) for side in ("chosen", "rejected")]
        if not prompt or not all(isinstance(each, str) and each.startswith(prompt) for each in answers):
            return False
        seen = True
    return seen


def _label_rows(context: Context, reader: LabelReader, row: Row, index: int) -> Iterator[Row]:
    value = context.value(row, "label")
    if value is None:
        context.counts["without_label"] += 1
        return
    if "completion" in context.columns:
        rows = convert.completion_rows(context, row, index)
    elif "messages" in context.columns:
        rows = convert.message_rows(context, row, index)
    elif holds_messages(context.value(row, "text")):
        moved = replace(context, columns={"messages": context.columns["text"]})
        rows = convert.message_rows(moved, row, index)
    else:
        rows = convert.text_rows(context, row, index)
    for each in rows:
        yield each | {"label": reader(value, index)}


def _chosen_rows(context: Context, row: Row, index: int) -> Iterator[Row]:
    """Yield ``{"prompt", "completion"}`` of preferences without their rejected answers."""
    answered = replace(context, columns={**context.columns, "rejected": context.columns["chosen"]})
    for pair in pairs.preference_rows(answered, row, index):
        others = {name: value for name, value in pair.items() if name not in ("chosen", "rejected")}
        yield others | {"completion": pair["chosen"]}


def _conversation_rows(context: Context, row: Row, index: int) -> Iterator[Row]:
    for each in convert.completion_rows(context, row, index):
        yield convert.as_conversation(each)


def _dialogue_rows(context: Context, row: Row, index: int) -> Iterator[Row]:
    yield {"messages": dialogue_messages(context.text(row, "text", index), context.place(index, "text"))}


def _prompt_rows(context: Context, shape: Format, row: Row, index: int) -> Iterator[Row]:
    """Yield ``{"prompt"}`` of a row of any form; a row without a prompt is dropped and counted."""
    if shape.form == PREFERENCE and "prompt" not in context.columns and "messages" not in context.columns:
        found = [each["prompt"] for each in pairs.preference_rows(context, row, index)]
        prompt = found[0] if found else None
    elif shape.form == TEXT:
        prompt = context.text(row, "text", index)
    else:
        prompt = convert.prompt_of(context, row, index)
    if prompt:
        yield {"prompt": prompt} | context.template_values(row)
    else:
        context.counts["empty_prompts"] += 1


def _is_consumed(name: str, columns: Mapping[str, str]) -> bool:
    """Return whether a column stands in the canonical row, and so is not passed on beside it."""
    own = {"prompt", "text", "input_ids", *TEMPLATE_COLUMNS}
    return name in own or any(column == name and meaning in own for meaning, column in columns.items())


def _with_kept(
    convert_row: Callable[[Row, int], Iterator[Row]], kept: list[str], row: Row, index: int
) -> Iterator[Row]:
    for each in convert_row(row, index):
        yield {name: row.get(name) for name in kept if name not in each} | each


def _description(
    form: str, columns: Mapping[str, str], notes: Sequence[str], ignored: Sequence[str], left: Mapping[str, Column],
    kept: bool,
) -> str:  # fmt: skip
    """Return how a source was understood: ``preference: question -> prompt, chosen, rejected; not used: id``."""
    read = [name if name == meaning else f"{name} -> {meaning}" for meaning, name in columns.items()]
    parts = [f"{form}: {', '.join(read)}", *notes]
    if left:
        parts.append(f"{'passed on' if kept else 'not used'}: {', '.join(left)}")
    if ignored:
        parts.append(f"ignored: {', '.join(ignored)}")
    return "; ".join(parts)
