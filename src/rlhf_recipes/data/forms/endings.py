"""End tokens of other models that a text carries: taken away, since this model would learn them as plain characters."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.counts import RowCounts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
COUNT = "foreign_ends"
ENDS = (
    "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<eos>", "<end_of_turn>", "<|end|>", "<|eos|>",
    "[EOS]", "<|endofturn|>", "<turn|>", "<|end_of_turn|>",
)  # fmt: skip
ANSWERS = ("completion", "chosen", "rejected", "text")


def foreign_ends(tokenizer: "PreTrainedTokenizerBase | None") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the endings to take from plain text, and those to take from what a message says.

    A plain text keeps the tokenizer's own tokens; the chat template adds them to a message itself.
    """
    if tokenizer is None:
        return (), ()
    vocabulary = tokenizer.get_vocab()
    unknown = tuple(end for end in ENDS if end not in vocabulary)
    return unknown, tuple(dict.fromkeys([*ENDS, str(tokenizer.eos_token)]))


def without_foreign_ends(
    rows: Iterator[Row], ends: tuple[tuple[str, ...], tuple[str, ...]], counts: RowCounts
) -> Iterator[Row]:
    """Yield the rows with the endings taken away; rows that had one are counted."""
    of_text, of_messages = ends
    for row in rows:
        changed = dict(row)
        for name in ANSWERS:
            value = row.get(name)
            if isinstance(value, str):
                changed[name] = _stripped(value, of_text)
            elif isinstance(value, list):
                changed[name] = [_stripped_message(turn, of_messages) for turn in value]
        if isinstance(row.get("messages"), list):
            changed["messages"] = [_stripped_message(turn, of_messages) for turn in row["messages"]]
        if changed != row:
            counts[COUNT] += 1
        yield changed


def _stripped_message(turn: Any, ends: tuple[str, ...]) -> Any:
    says = isinstance(turn, Mapping) and turn.get("role") == "assistant" and isinstance(turn.get("content"), str)
    return dict(turn) | {"content": _stripped(turn["content"], ends)} if says else turn


def _stripped(text: str, ends: tuple[str, ...]) -> str:
    bare = text.rstrip()
    end = next((each for each in ends if bare.endswith(each)), None)
    return bare[: -len(end)] if end else text
