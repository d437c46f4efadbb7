"""Tokenization of texts, prompts, answers and pairs. Every stage, loss, score, measure and sample uses these functions.

Plain text begins with the prefix of the tokenizer (see `special_tokens`) and ends with one EOS. A conversation begins as
its chat template says and ends at the token that ends the last turn: what the template writes after it, such as ChatML's
line break, is left out, because a policy never samples it.

`template` stands for the keyword arguments `tools` and `chat_template_kwargs`, which go to the chat template.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import (
    column_template_options,
    is_conversation,
    join_turns,
    prompt_text,
    render_messages,
    template_options,
    turn_end,
    without_tail,
)
from rlhf_recipes.data.special_tokens import begin_with, bos_prefix, end_with_eos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_ids(value: Any) -> bool:
    """Whether a prompt is given as a list of token ids."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], numbers.Integral)


def plain_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenize a text as it is, without any token before or after it. Special tokens written in it become their ids."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def text_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenize plain text, with `bos_prefix` once and without any token that the tokenizer would append."""
    return begin_with(bos_prefix(tokenizer), plain_ids(text, tokenizer))


def encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenize a complete text: `text_ids` and one EOS."""
    return end_with_eos(text_ids(text, tokenizer), tokenizer)


def prompt_ids(prompt: Any, tokenizer: "PreTrainedTokenizerBase", **template: Any) -> list[int]:
    """Tokenize a prompt given as text or messages; ids are returned as they are.

    The same prompt has the same ids in each form. An assistant turn at the end of the messages is continued.

    Raises:
        UserError: an empty prompt, or messages that the chat template refuses.
    """
    if is_ids(prompt):
        return [int(token) for token in prompt]
    text = prompt_text(prompt, tokenizer, **template)
    ids = plain_ids(text, tokenizer)  # a template writes BOS itself
    if not ids:
        raise UserError(f"an empty prompt ({prompt!r}) cannot be continued; drop it from the dataset")
    return ids if is_conversation(prompt) else begin_with(bos_prefix(tokenizer), ids)


def column_prompt_ids(
    prompts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int | None = None,
) -> list[list[int]]:
    """Tokenize prompts with what the columns `tools` and `chat_template_kwargs` hold for each; see `prompt_ids`.

    max_prompt_tokens: keep this many last tokens of a longer prompt; None: all.
    """
    rows = column_template_options(columns, len(prompts))
    ids = [prompt_ids(prompt, tokenizer, **row) for prompt, row in zip(prompts, rows, strict=True)]
    return ids if max_prompt_tokens is None else [row[-max_prompt_tokens:] for row in ids]


def encode_completion(
    prompt: Any, completion: Any, tokenizer: "PreTrainedTokenizerBase", **template: Any
) -> tuple[list[int], list[int]]:
    """Tokenize prompt and completion as one text and split the ids where the prompt's own ids end.

    Returns (prompt ids, completion ids). The completion ends with the token at which a policy stops: EOS, or the token
    that ends an assistant turn of the chat template. An empty prompt is allowed: all of `completion` (text, or messages
    of any role) is then the second part.
    """
    if is_conversation(completion):
        text = render_messages(join_turns(prompt or [], completion), tokenizer, **template)
        ids = plain_ids(without_tail(text, tokenizer), tokenizer)
    else:
        ids = encode_text((prompt or "") + completion, tokenizer)
    before = prompt_ids(prompt, tokenizer, **template) if prompt else []
    shared = shared_length(before, ids)  # a token may span the boundary
    return ids[:shared], ids[shared:]


def encode_pair(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Tokenize a preference: `prompt_ids`, `chosen_ids` and `rejected_ids` of the two answers, and `margin` if there is one.

    row: chosen and rejected, optionally prompt, margin, tools and chat_template_kwargs.
    """
    prompt, template = row.get("prompt"), template_options(row)
    pairs = [encode_completion(prompt, row[side], tokenizer, **template) for side in ("chosen", "rejected")]
    shared = min(len(before) for before, _ in pairs)
    chosen, rejected = ([*before, *answer] for before, answer in pairs)
    margin = {"margin": float(row["margin"])} if row.get("margin") is not None else {}
    return {"prompt_ids": chosen[:shared], "chosen_ids": chosen[shared:], "rejected_ids": rejected[shared:], **margin}


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of first tokens that two rows share."""
    same = (first == second for first, second in zip(one, other, strict=False))
    return next((index for index, equal in enumerate(same) if not equal), min(len(one), len(other)))


def answer_ends(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids that end an answer: EOS and the token that ends an assistant turn of the chat template."""
    end = turn_end(tokenizer)
    return {int(tokenizer.eos_token_id)} | ({end.id} if end is not None else set())


def is_empty_answer(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether an answer says nothing: it has no token, or none but the one that ends it."""
    return len(ids) == 0 or (len(ids) == 1 and ids[0] in answer_ends(tokenizer))
