"""Rows of texts, conversations, prompts and answers as canonical rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError, shortened
from rlhf_recipes.data.forms.context import Context
from rlhf_recipes.data.forms.messages import Message, holds_messages

Row = dict[str, Any]
EMPTY_ANSWERS = "empty_answers"
EMPTY_ROWS = "empty_rows"


def text_rows(context: Context, row: Mapping[str, Any], index: int) -> Iterator[Row]:
    """Yield ``{"text"}``; a row without text is dropped and counted."""
    text = context.text(row, "text", index)
    if text.strip():
        yield {"text": text}
    else:
        context.counts[EMPTY_ROWS] += 1


def message_rows(context: Context, row: Mapping[str, Any], index: int) -> Iterator[Row]:
    """Yield ``{"messages"}``; a conversation without anything that an assistant says is dropped and counted."""
    turns = context.with_system(row, index, context.messages(row, "messages", index))
    if not any(_says_something(turn) for turn in turns):
        context.counts[EMPTY_ROWS if not turns else EMPTY_ANSWERS] += 1
        return
    yield {"messages": turns} | context.template_values(row)


def completion_rows(context: Context, row: Mapping[str, Any], index: int) -> Iterator[Row]:
    """Yield ``{"prompt", "completion"}``, both text or both messages; an empty prompt or answer is dropped and counted.

    A completion that repeats its prompt loses it. A completion of several turns becomes ``{"messages"}``: loss is on its
    assistant turns alone, and on none of the prompt's.
    """
    if not context.chat:
        prompt, completion = context.prompt_text(row, index), context.text(row, "completion", index)
        if prompt and completion.startswith(prompt):
            completion = completion[len(prompt) :]
        if _kept(context, prompt, completion.strip()):
            yield {"prompt": prompt, "completion": completion}
        return
    turns = context.prompt_messages(row, index)
    answer = _without_prompt(context.answer(row, "completion", index), turns)
    if _kept(context, turns, any(_says_something(turn) for turn in answer)):
        yield {"prompt": turns, "completion": answer} | context.template_values(row)


def as_conversation(row: Row) -> Row:
    """Return a row of prompt and completion as messages with loss on the completion's assistant turns only."""
    before = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in row["prompt"]]
    others = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    return {"messages": [*before, *row["completion"]]} | others


def is_one_turn(row: Row) -> bool:
    """Return whether a row's completion is text, or turns of the assistant and its tools only."""
    answer = row["completion"]
    return isinstance(answer, str) or all(turn["role"] in ("assistant", "tool") for turn in answer)


def prompt_of(context: Context, row: Mapping[str, Any], index: int) -> Any:
    """Return the prompt of a row, as text, messages or ids; None where there is none.

    Of a conversation it is all before the last assistant turn.
    """
    if "input_ids" in context.columns:
        return context.value(row, "input_ids")
    if "messages" in context.columns and "prompt" not in context.columns:
        turns = context.with_system(row, index, context.messages(row, "messages", index))
        if len(turns) > 1 and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return turns or None
    value = context.value(row, "prompt")
    if isinstance(value, (list, tuple)) and value and not holds_messages(value):
        return _ids(value, context.place(index, "prompt"))
    if context.chat:
        return context.prompt_messages(row, index) or None
    return context.prompt_text(row, index) or None


def _ids(value: Sequence[Any], place: str) -> list[int]:
    if not all(isinstance(each, int) for each in value):
        raise UserError(f"{place} holds {shortened(list(value))}; give text, messages or token ids")
    return list(value)


def _without_prompt(answer: list[Message], prompt: list[Message]) -> list[Message]:
    """Return an answer without the prompt, where it begins with it."""
    bare = [(turn["role"], turn["content"]) for turn in prompt]
    begins = bare and [(turn["role"], turn["content"]) for turn in answer[: len(bare)]] == bare
    return answer[len(bare) :] if begins else answer


def _kept(context: Context, prompt: Any, answered: Any) -> bool:
    """Return whether a row has a prompt and an answer; otherwise count it."""
    if not answered:
        context.counts[EMPTY_ANSWERS] += 1
    elif not prompt:
        context.counts["empty_prompts"] += 1
    return bool(answered and prompt)


def _says_something(turn: Message) -> bool:
    calls = turn.get("tool_calls") or turn.get("function_call")
    return turn["role"] == "assistant" and bool((turn["content"] or "").strip() or calls)
