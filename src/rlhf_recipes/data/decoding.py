"""From ids back to text, so that prompt and answer together are what their ids say together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.encoding import is_ids
from rlhf_recipes.data.special_tokens import bos_prefix, special_token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 32  # last tokens of a prompt that decide how the first tokens of its answer are decoded
UNFINISHED = "\ufffd"  # of a character whose bytes are not complete


def decode_answers(
    prompt_ids: Sequence[Sequence[int]], answer_ids: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """Decode answers behind their prompts, without special tokens of the answers.

    Some tokenizers (SentencePiece: Llama-2, Mistral) strip the space at the beginning of what they decode, and a prompt may
    end within a character. So an answer is what its ids add to the text of the prompt.
    """
    special, start = set(special_token_texts(tokenizer).values()), bos_prefix(tokenizer)
    answers = [[token for token in row if token not in special] for row in answer_ids]
    # After nothing but BOS, an answer begins a text.
    contexts = [[] if list(row) == start else list(row[-CONTEXT:]) for row in prompt_ids]
    wholes = _decode([[*context, *answer] for context, answer in zip(contexts, answers, strict=True)], tokenizer)
    befores = [text.rstrip(UNFINISHED) for text in _decode(contexts, tokenizer)]
    alone = _decode(answers, tokenizer)
    rows = zip(wholes, befores, alone, strict=True)
    return [whole[len(before) :] if whole.startswith(before) else text for whole, before, text in rows]


def decode_prompt(
    ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", *, skip_special_tokens: bool = False
) -> str:
    """Decode a prompt without its prefix (BOS), and without a character at its end that is not complete."""
    start = bos_prefix(tokenizer)
    rest = list(ids[len(start) :]) if list(ids[: len(start)]) == start else list(ids)
    if skip_special_tokens:
        special = set(special_token_texts(tokenizer).values())
        rest = [token for token in rest if token not in special]
    return _decode([rest], tokenizer)[0].rstrip(UNFINISHED)


def readable_prompts(prompts: Sequence[Any], tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """Return prompts with those given as ids decoded; text and messages are returned as they are."""
    return [decode_prompt(prompt, tokenizer) if is_ids(prompt) else prompt for prompt in prompts]


def _decode(rows: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    if not rows:
        return []
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [str(text) for text in tokenizer.batch_decode([list(row) for row in rows], **options)]
