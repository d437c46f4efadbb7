"""How a text and a document begin and end for a tokenizer: the special tokens around plain text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_tokens_around_text(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before plain text, and those that it appends.

    Llama: BOS, nothing. GLM-4: ``[gMASK]<sop>``, nothing. GPT-2: nothing, nothing. With ``add_eos_token``: ..., EOS.
    """
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def bos_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that begin every plain text: BOS for Llama, ``[gMASK]<sop>`` for GLM-4, nothing for GPT-2."""
    return special_tokens_around_text(tokenizer)[0]


def document_start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the context in which the first token of a document is predicted: `bos_prefix`, or else an EOS.

    Documents of a tokenizer without a prefix are separated by EOS in pretraining, so a document follows one.
    """
    return bos_prefix(tokenizer) or ([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])


def begin_with(prefix: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return the ids with the prefix before them. A text that already begins with it, as rendered templates do, has it once."""
    return list(ids) if list(ids[: len(prefix)]) == list(prefix) else [*prefix, *ids]


def end_with_eos(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids with one EOS at their end."""
    eos = int(tokenizer.eos_token_id)
    return list(ids) if list(ids[-1:]) == [eos] else [*ids, eos]


def special_token_texts(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the id of each special token by its text. Added tokens that are text, such as ``<tool_call>``, are none."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return added | {str(text): int(number) for text, number in named}
