"""The function that turns a row of a source into canonical rows, by the format of the source."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf_recipes.core.arguments import ReadingArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms import convert, pairs
from rlhf_recipes.data.forms.context import Context
from rlhf_recipes.data.forms.formats import COMPLETION, LABEL, MESSAGES, PREFERENCE, PROMPT, TEXT, Format
from rlhf_recipes.data.forms.labels import LabelReader
from rlhf_recipes.data.forms.messages import holds_messages
from rlhf_recipes.data.forms.options import FormOptions
from rlhf_recipes.data.forms.survey import Column
from rlhf_recipes.data.forms.transcripts import dialogue_messages
from rlhf_recipes.data.reading import Source

Row = dict[str, Any]
Converter = Callable[[Row, int], Iterator[Row]]


def row_converter(
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
        return partial(_chosen_rows, context), form, ["training on the chosen answers"]
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
