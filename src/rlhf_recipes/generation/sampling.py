"""Sample completions of prompts.

Each row draws random numbers from its own seed. So the answer to a prompt does not depend on the other rows of its
batch, on the batch size, or on the process. Of the model's generation_config only the stop tokens count: a repetition
penalty or top-p left in it would sample from another distribution than the one whose log-probabilities are trained."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_recipes.core.progress import Advance
from rlhf_recipes.core.tensors import batches_by_length, pad, position_ids
from rlhf_recipes.data import decode_answers, is_conversation, prompt_ids, require_turn_end, turn_end
from rlhf_recipes.generation.own_cache import batches_of_equal_length, generate_equal_rows, rows_at_once
from rlhf_recipes.models import token_count
from rlhf_recipes.optimizations import (
    preallocated_cache,
    prepacked_weights,
    supports_preallocated_cache,
    without_cudnn_attention,
)
from rlhf_recipes.system import apply_bitsandbytes_workarounds_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    max_new_tokens: longest answer in tokens.
    temperature: 0 takes the most likely token.
    top_k: draw from the k most likely tokens; 0: from all.
    top_p: draw from the most likely tokens that together have this probability; 1: from all.
    min_p: leave out tokens less likely than this share of the most likely one's probability (Nguyen et al. 2024).
    min_new_tokens: draw no stop token before the answer has so many tokens.
    stop_ids: tokens that end an answer.
    vocabulary: draw ids below this number only; None: all that the model has an embedding for. Models have more
        embeddings than their tokenizer has tokens, and no other model need know such an id.
    """

    max_new_tokens: int = 53
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    vocabulary: int | None = None


@dataclass
class Completions:
    """ids: the generated tokens of each row, with its stop token. stopped: whether a stop token ended the row."""

    ids: list[list[int]]
    stopped: list[bool]

    def texts(self, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]]) -> list[str]:
        """Decode each row behind its prompt (ids), without special tokens: what it adds to the text of the prompt."""
        return decode_answers(prompts, self.ids, tokenizer)


def stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None) -> tuple[int, ...]:
    """Return the ids that end an answer.

    They are every EOS id of the model's generation config, or else of its config, or else of the tokenizer; and the token
    that ends an assistant turn of the tokenizer's chat template.
    """
    stops: tuple[int, ...] = ()
    for config in (model.config, getattr(model, "generation_config", None)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            stops = tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    if tokenizer is None:
        return stops
    if not stops and tokenizer.eos_token_id is not None:
        stops = (int(tokenizer.eos_token_id),)
    end = turn_end(tokenizer)
    return stops if end is None or end.id in stops else (*stops, end.id)


def reset_generation_config_(model: "PreTrainedModel", stop_ids: set[int]) -> None:
    """Replace the model's generation config by one with special token ids only.

    Settings such as no_repeat_ngram_size or suppress_tokens change the distribution that answers are sampled from, and the
    trained log-probabilities do not know them.
    """
    from transformers import GenerationConfig

    config = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=sorted(stop_ids), pad_token_id=config.pad_token_id
    )


def check_turn_end(prompt: Any, tokenizer: "PreTrainedTokenizerBase", configured: Collection[int], name: str) -> None:
    """Check that an answer to a prompt of messages has an end; a prompt in another form is not looked at.

    A warning is logged where the chat template ends an answer with a token that is no EOS of the model.

    Args:
        configured: the EOS ids of the model.
        name: what messages call the model.

    Raises:
        UserError: the chat template writes no special token after an answer.
    """
    if not is_conversation(prompt):
        return
    end = require_turn_end(tokenizer, name)
    if end.id not in configured:
        logger.warning(
            "the chat template of %s ends an answer with %s, which is no EOS of the model; answers stop there here, but not "
            "elsewhere: train it with --eos_token, or set eos_token_id in its generation_config.json", name, end.token
        )  # fmt: skip


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Any],
    *,
    max_new_tokens: int = 53,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """Answer prompts (text, messages or ids) with text. The same seed gives the same answers for any batch size."""
    rows = [prompt_ids(prompt, tokenizer) for prompt in prompts]  # first: it may set the tokenizer's chat template
    stops, vocabulary = stop_ids(model, tokenizer), token_count(tokenizer)
    sampling = Sampling(max_new_tokens, temperature, stop_ids=stops, vocabulary=vocabulary)
    seeds = [row_seed(seed, index) for index in range(len(rows))]
    return sample(model, rows, sampling, seeds, batch_size).texts(tokenizer, rows)


def row_seed(seed: int, index: int) -> int:
    """Return the seed of the index-th row of a run; distinct pairs give unrelated streams (splitmix64's mixer)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63


@torch.no_grad()
def sample(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    batch_size: int = 64,
    advance: Advance | None = None,
) -> Completions:
    """Continue rows of token ids; the result is in the order of `prompts`.

    The model runs in eval mode and gets its former mode back.

    Args:
        prompts: token ids of each row.
        seeds: one for each row, for example from `row_seed`.
        batch_size: rows in one forward pass; rows of similar length share a batch.
        advance: called after each step with the number of tokens that need no more work, of ``max_new_tokens`` a row.
    """
    was_training = model.training
    apply_bitsandbytes_workarounds_(model).eval()
    ids: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt) for prompt in prompts]
    has_plain_cache = supports_preallocated_cache(model)
    continue_batch = _sample_batch if has_plain_cache else _sample_equal_rows
    try:
        with prepacked_weights(model), without_cudnn_attention():
            batches = batches_by_length if has_plain_cache else batches_of_equal_length
            for rows in batches(lengths, rows_at_once(model, batch_size)):
                part = [prompts[row] for row in rows], sampling, [seeds[row] for row in rows]
                answers = continue_batch(model, *part, advance or _ignore)
                for row, answer in zip(rows, answers, strict=True):
                    ids[row] = answer
    finally:
        model.train(was_training)
    return Completions(ids, [bool(row) and row[-1] in sampling.stop_ids for row in ids])


def _sample_batch(
    model: "PreTrainedModel", prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int], advance: Advance
) -> list[list[int]]:
    device = next(model.parameters()).device
    ids, mask = (tensor.to(device) for tensor in pad(prompts, value=0, side="left"))
    uniforms = torch.stack([_uniform_draws(seed, sampling.max_new_tokens) for seed in seeds]).to(device)
    stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # rows without a stop token so far
    tokens, positions, cache = ids, position_ids(mask), preallocated_cache(model.config)
    for step in range(sampling.max_new_tokens):
        output = model(
            input_ids=tokens, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        drawn = _draw_tokens(_allowed(output.logits[:, -1], sampling, step), sampling, uniforms[:, step])
        for row, token in zip(active, drawn.tolist(), strict=True):
            answers[row].append(token)
        unfinished = ~torch.isin(drawn, stops)
        ended = len(active) - int(unfinished.sum())
        advance(len(active) + ended * (sampling.max_new_tokens - step - 1))  # ended rows need no more steps
        if ended:  # finished rows leave the batch and cost nothing more
            rows = unfinished.nonzero().squeeze(-1)
            active = [active[index] for index in rows.tolist()]
            if not active:
                break
            cache.batch_select_indices(rows)
            drawn, mask, uniforms, positions = drawn[rows], mask[rows], uniforms[rows], positions[rows]
        tokens, positions = drawn[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return answers


def _ignore(count: int) -> None:
    """Show no progress."""


def _sample_equal_rows(
    model: "PreTrainedModel", prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int], advance: Advance
) -> list[list[int]]:
    uniforms = torch.stack([_uniform_draws(seed, sampling.max_new_tokens) for seed in seeds])
    steps = 0

    def draw(logits: Tensor, step: int) -> Tensor:
        nonlocal steps
        steps += 1
        advance(len(prompts))
        return _draw_tokens(_allowed(logits, sampling, step), sampling, uniforms[:, step].to(logits.device))

    answers = generate_equal_rows(model, prompts, draw, sampling.max_new_tokens, sampling.stop_ids)
    advance(len(prompts) * (sampling.max_new_tokens - steps))
    return answers


def _allowed(logits: Tensor, sampling: Sampling, step: int) -> Tensor:
    """Return the logits of the ids that may be drawn at this step: (batch, ids) -> (batch, vocabulary)."""
    logits = logits[:, : sampling.vocabulary]
    if step < sampling.min_new_tokens:
        stops = [stop for stop in sampling.stop_ids if stop < logits.shape[-1]]
        logits = logits.index_fill(-1, torch.tensor(stops, dtype=torch.long, device=logits.device), -torch.inf)
    return logits


def _uniform_draws(seed: int, count: int) -> Tensor:
    """Draw `count` float64 numbers in [0, 1), on the CPU so that they are the same on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draw_tokens(logits: Tensor, sampling: Sampling, draw: Tensor) -> Tensor:
    """Draw the next token of each row by inverting its cumulative distribution: (batch, vocabulary) -> (batch,).

    draw: (batch,), in [0, 1).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = _truncated(torch.softmax(logits.float() / sampling.temperature, dim=-1), sampling)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # Scaled by the total, so that rounding never selects a token of probability 0 at the end.
    index = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return index.clamp(max=logits.shape[-1] - 1)


def _truncated(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Set the probabilities that top_k, min_p and top_p leave out to 0, without normalizing: (batch, vocabulary)."""
    if sampling.top_k > 0:
        threshold = probabilities.topk(min(sampling.top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= threshold, 0.0)
    if sampling.min_p > 0:
        threshold = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= threshold, 0.0)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        preceding = ordered.cumsum(dim=-1) - ordered
        nucleus = ordered.where(preceding < sampling.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, nucleus)
    return probabilities
