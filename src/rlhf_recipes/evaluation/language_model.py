"""Perplexity and bits per byte; each token is predicted exactly once."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import begin_with, bos_prefix, decode_answers, document_start, plain_ids
from rlhf_recipes.models import context_length
from rlhf_recipes.system import apply_bitsandbytes_workarounds_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _Window(NamedTuple):
    """`ids` is the model's input; tokens from position `first_scored` on are predicted."""

    ids: list[int]
    first_scored: int


def perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Compute the perplexity of whole texts.

    Every text begins as in pretraining: with what the tokenizer puts before text (BOS for Llama), or else after the EOS of
    another document. This is context and is not predicted; no special token is added at the end. A text longer than the
    context is split into windows that overlap by half: each token is predicted once, after at least half a context of
    history (or all there is, near the start).

    Args:
        batch_size: windows in one forward pass.
        max_length: context in tokens; None: the model's. A model without one reads each text as a whole.
        progress: show a progress bar.

    Returns:
        `perplexity` (exp of `loss`), `bits_per_byte` (comparable between tokenizers), `loss` (nats per token),
        `tokens` (predicted) and `bytes` (UTF-8, of the given texts).

    Raises:
        UserError: no tokens, a context that is too short or beyond the model's, or a tokenizer with neither BOS nor EOS.
    """
    context = _window_length(model, max_length)
    start, prefix = _start(tokenizer), bos_prefix(tokenizer)
    rows = [
        begin_with(prefix, plain_ids(text, tokenizer)) if prefix else [*start, *plain_ids(text, tokenizer)]
        for text in texts
    ]
    windows = [window for ids in rows for window in _windows(ids, len(start), context)]
    size = sum(len(text.encode("utf-8")) for text in texts)
    return _summary(model, windows, size, batch_size, progress)


def completion_perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Compute the perplexity of completions given their prompts.

    Args:
        pairs: `(prompt_ids, completion_ids)`, used as they are: a chat template has already been applied, and an EOS
            at the end of a completion is predicted like any token. An empty prompt becomes the start of a document.
        batch_size, max_length, progress: as in `perplexity`; longer rows are split into windows as there.

    Returns:
        The keys of `perplexity`. `bytes` are those of the decoded completions without special tokens, so a predicted
        EOS adds to the bits and not to the bytes.

    Raises:
        UserError: as in `perplexity`.
    """
    context = _window_length(model, max_length)
    rows = [(list(prompt) or _start(tokenizer), list(completion)) for prompt, completion in pairs]
    windows = [
        window for prompt, completion in rows for window in _windows([*prompt, *completion], len(prompt), context)
    ]
    decoded = decode_answers([prompt for prompt, _ in pairs], [completion for _, completion in pairs], tokenizer)
    size = sum(len(text.encode("utf-8")) for text in decoded)
    return _summary(model, windows, size, batch_size, progress)


def _windows(ids: list[int], first_scored: int, context: int | None) -> list[_Window]:
    """Split `ids` so that each token from `first_scored` on is scored once, after at least half a context.

    Without a context there is one window.
    """
    windows: list[_Window] = []
    scored, context = first_scored, context or len(ids)
    while scored < len(ids):
        begin = max(0, scored - context // 2)
        end = min(len(ids), begin + context)
        begin = max(0, end - context)  # the last window reaches back for all the history that fits
        windows.append(_Window(ids[begin:end], scored - begin))
        scored = end
    return windows


def _summary(
    model: "PreTrainedModel", windows: list[_Window], size: int, batch_size: int, progress: bool
) -> dict[str, float]:
    """Score the windows; `size` is the number of bytes."""
    if not windows:
        raise UserError("perplexity of no tokens; give at least one text that is not empty")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; give at least 1")
    tokens = sum(len(window.ids) - window.first_scored for window in windows)
    nats = _negative_log_likelihood(model, windows, batch_size, progress)
    loss = nats / tokens
    return {
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / size if size else math.inf,
        "loss": loss,
        "tokens": tokens,
        "bytes": size,
    }


def _negative_log_likelihood(
    model: "PreTrainedModel", windows: list[_Window], batch_size: int, progress: bool
) -> float:
    """Sum -log p over all scored tokens, in nats. Windows of similar length share a batch, to save padding."""
    ordered = sorted(windows, key=lambda window: len(window.ids), reverse=True)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    was_training = model.training
    apply_bitsandbytes_workarounds_(model).eval()
    try:
        with torch.no_grad():
            return math.fsum(_batch_nats(model, batch) for batch in tqdm(batches, "perplexity", disable=not progress))
    finally:
        model.train(was_training)


def _batch_nats(model: "PreTrainedModel", batch: list[_Window]) -> float:
    rows = [torch.tensor(window.ids) for window in batch]
    lengths = torch.tensor([len(row) for row in rows])
    # Padding is on the right and masked, so its id does not matter: 0 works for any tokenizer.
    ids = pad_sequence(rows, batch_first=True).to(model.device)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    nats = 0.0
    for row, window in enumerate(batch):  # one row at a time keeps the float32 copy of the logits small
        end, first = len(window.ids), window.first_scored
        scored = logits[row, first - 1 : end - 1].float()
        nats += cross_entropy(scored, ids[row, first:end], reduction="none").double().sum().item()
    return nats


def _window_length(model: "PreTrainedModel", max_length: int | None) -> int | None:
    """Return the longest window: `max_length`, which may not exceed the model's context, or that; None: no limit."""
    limit = context_length(model.config)
    context = min((length for length in (max_length, limit) if length is not None), default=None)
    if context is not None and context < 2:
        raise UserError(f"a context of {context} tokens predicts nothing; set max_length to at least 2")
    if max_length is not None and context != max_length:
        raise UserError(f"max_length {max_length} exceeds the model's context; set it to {context} or less")
    return context


def _start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    start = document_start(tokenizer)
    if not start:
        raise UserError("the tokenizer has neither BOS nor EOS, so a first token has no context; give it an EOS token")
    return start
