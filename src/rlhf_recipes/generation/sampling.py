"""Prompts to completions.

Each row draws its own random numbers from its own seed, so what a prompt is answered with does not depend on the rows
it is batched with, on the batch size, or on the process it lands on. The model's own generation_config names the stop
tokens and nothing else: a left-over repetition penalty or top-p would sample from another distribution than the one
whose log-probabilities are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_recipes.core.tensors import batches_by_length, pad, position_ids
from rlhf_recipes.data import prompt_ids
from rlhf_recipes.optimizations import preallocated_cache, prepacked_weights, without_cudnn_attention
from rlhf_recipes.system import apply_bitsandbytes_workarounds_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the likeliest token; top_k 0, top_p 1 and min_p 0 cut nothing.

    min_p: leave out tokens less likely than this share of the likeliest one's probability (Nguyen et al. 2024).
    min_new_tokens: no stop token is drawn before so many tokens stand.
    """

    max_new_tokens: int = 53
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass
class Completions:
    """ids: the generated tokens of each row, its stop token included. stopped: whether the row ended by a stop token."""

    ids: list[list[int]]
    stopped: list[bool]

    def texts(self, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        return [str(text) for text in tokenizer.batch_decode(self.ids, skip_special_tokens=True)]


def stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None) -> tuple[int, ...]:
    """Every EOS id of the model's generation config, else of its config, else the tokenizer's."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    return (int(tokenizer.eos_token_id),) if tokenizer is not None and tokenizer.eos_token_id is not None else ()


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
    sampling = Sampling(max_new_tokens, temperature, stop_ids=stop_ids(model, tokenizer))
    rows = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    seeds = [row_seed(seed, index) for index in range(len(rows))]
    return sample(model, rows, sampling, seeds, batch_size).texts(tokenizer)


def row_seed(seed: int, index: int) -> int:
    """A seed of its own for the index-th row of a run; distinct pairs give unrelated streams (splitmix64's mixer)."""
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
) -> Completions:
    """Continue rows of token ids. seeds: one a row. Rows of like length share a batch; the order is kept.

    The model is put into eval mode for the time, and given back in the mode it had.
    """
    training = model.training
    apply_bitsandbytes_workarounds_(model).eval()
    ids: list[list[int]] = [[] for _ in prompts]
    try:
        with prepacked_weights(model), without_cudnn_attention():
            for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
                answers = _sample_batch(model, [prompts[row] for row in rows], sampling, [seeds[row] for row in rows])
                for row, answer in zip(rows, answers, strict=True):
                    ids[row] = answer
    finally:
        model.train(training)
    return Completions(ids, [bool(row) and row[-1] in sampling.stop_ids for row in ids])


def _sample_batch(
    model: "PreTrainedModel", prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int]
) -> list[list[int]]:
    device = next(model.parameters()).device
    ids, mask = (tensor.to(device) for tensor in pad(prompts, value=0, side="left"))
    draws = torch.stack([_uniforms(seed, sampling.max_new_tokens) for seed in seeds]).to(device)
    stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    tokens, place, cache = ids, position_ids(mask), preallocated_cache(model.config)
    for step in range(sampling.max_new_tokens):
        output = model(
            input_ids=tokens, attention_mask=mask.long(), position_ids=place, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        logits = output.logits[:, -1]
        if step < sampling.min_new_tokens:
            logits = logits.index_fill(-1, stops, -torch.inf)
        chosen = _choose(logits, sampling, draws[:, step])
        for row, token in zip(alive, chosen.tolist(), strict=True):
            answers[row].append(token)
        going = ~torch.isin(chosen, stops)
        if not bool(going.all()):  # rows that have stopped leave the batch, so they cost nothing more
            kept = going.nonzero().squeeze(-1)
            alive = [alive[index] for index in kept.tolist()]
            if not alive:
                break
            cache.batch_select_indices(kept)
            chosen, mask, draws, place = chosen[kept], mask[kept], draws[kept], place[kept]
        tokens, place = chosen[:, None], place[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return answers


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _choose(logits: Tensor, sampling: Sampling, draw: Tensor) -> Tensor:
    """The next token of each row, by inverting the cumulative distribution at `draw`. (batch, vocabulary) -> (batch,)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = _cut(torch.softmax(logits.float() / sampling.temperature, dim=-1), sampling)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # Scaled by the last sum, so that rounding can never lead past the last token that has any probability.
    index = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return index.clamp(max=logits.shape[-1] - 1)


def _cut(probabilities: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k > 0:
        least = probabilities.topk(min(sampling.top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= least, 0.0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= least, 0.0)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = ordered.where(before < sampling.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return probabilities
