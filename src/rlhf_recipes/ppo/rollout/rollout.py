"""The record of an update's episodes, and the arithmetic that completes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.core.tensors import Reduce, identity, length_mask, masked_mean, masked_whiten, pad
from rlhf_recipes.data import readable_prompts
from rlhf_recipes.generation import Completions
from rlhf_recipes.optimizations import TILE
from rlhf_recipes.ppo.rollout.advantages import generalized_advantages
from rlhf_recipes.ppo.rollout.rewards import kl_estimates, penalize_missing_eos, token_rewards

# As wide as query and answer; every other tensor is as wide as the answer.
FULL_WIDTH = ("input_ids", "attention_mask", "lower_states")


@dataclass
class Rollout:
    """Tensors of one process's episodes: each row is a query, its answer, and padding.

    Padding is on the right only, so a causal model needs no attention mask for it.
    """

    input_ids: Tensor  # (batch, width) long; width: tokens of the longest query and answer together
    attention_mask: Tensor  # (batch, width) long
    response_mask: Tensor  # (batch, tokens) bool: generated tokens, the stop token included
    stopped: Tensor  # (batch,) bool: ended by a stop token
    scores: Tensor  # (batch,) float32: the answer's total score, token rewards and the missing-EOS penalty included
    log_probs: Tensor  # (batch, tokens) float32, like all below
    reference_log_probs: Tensor
    values: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    baseline: Tensor | None = None  # (batch, tokens) float32: the part of `values` that `ValuePrior` gives, if any
    lower_states: Tensor | None = None  # (batch, width, hidden_size): output of the frozen lower layers, if any

    def __len__(self) -> int:
        return len(self.input_ids)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) is not None}

    def select(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the episodes of one micro-batch as the mapping that `compute_loss` takes. rows: (micro-batch,) long."""
        return {name: tensor[rows] for name, tensor in self.tensors().items()}

    def by_length(self, rows: Tensor) -> Tensor:
        """Return the rows sorted by length, the shortest episode first."""
        return rows[self.attention_mask[rows].sum(1).argsort(stable=True).to(rows.device)]

    def episode_metrics(self, kl_coef: float) -> dict[str, Tensor]:
        """Return the metrics of each episode, (batch,) each, under TRL's names."""
        penalty = kl_coef * self.kl.sum(1)
        return {
            "objective/kl": self.kl.sum(1),
            "objective/entropy": -self.log_probs.sum(1),
            "objective/non_score_reward": -penalty,
            "objective/rlhf_reward": self.scores - penalty,
            "objective/scores": self.scores,
            "completions/mean_length": self.response_mask.sum(1).float(),
            "completions/eos_share": self.stopped.float(),
        }

    def explained_variance(self, reduce: Reduce = identity) -> float:
        """Return the share of the returns' variance that the values explain, over the tokens of all processes; at most 1."""
        mask = self.response_mask
        spread = masked_mean((self.returns - masked_mean(self.returns, mask, reduce)) ** 2, mask, reduce)
        error = masked_mean((self.returns - self.values) ** 2, mask, reduce)
        return float(1.0 - error / spread.clamp(min=1e-8))


@dataclass(frozen=True)
class RewardOptions:
    """The options that turn scores into advantages, under the names of `PPOConfig`."""

    kl_coef: float
    kl_estimator: str
    gamma: float
    lam: float
    whiten_rewards: bool
    missing_eos_penalty: float | None

    @classmethod
    def of(cls, config: Any, **changed: float) -> "RewardOptions":
        """Take the options from a `PPOConfig`; `changed` replaces those that have changed during the run."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)} | changed)


def concatenate_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Return the episodes of several rollouts as one, padded to the widest."""
    widths = {name: max(getattr(part, name).shape[-1 if name != "lower_states" else 1] for part in parts)
              for name, tensor in parts[0].tensors().items() if tensor.dim() > 1}  # fmt: skip
    return Rollout(
        **{
            name: torch.cat([_widened(getattr(part, name), widths.get(name)) for part in parts])
            for name in parts[0].tensors()
        }
    )


def _widened(tensor: Tensor, width: int | None) -> Tensor:
    if width is None or tensor.shape[1] == width:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), width - tensor.shape[1], *tensor.shape[2:])], dim=1)


def as_samples(
    prompts: Mapping[str, Any], scores: Mapping[str, Sequence[Any]], completions: Completions, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return one row per episode: prompt, completion as text, number of tokens, whether it stopped, score by reward.

    prompts: `prompts` and their `prompt_ids`.
    """
    texts = completions.texts(tokenizer, prompts["prompt_ids"])
    lengths = [len(ids) for ids in completions.ids]
    return [
        {"prompt": prompt, "completion": text, "tokens": length, "stopped": stopped}
        | {name: values[row] for name, values in scores.items()}
        for row, (prompt, text, length, stopped) in enumerate(
            zip(readable_prompts(prompts["prompts"], tokenizer), texts, lengths, completions.stopped, strict=True)
        )
    ]


def pad_episodes(
    queries: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int = 0
) -> dict[str, Tensor]:
    """Return input_ids, attention_mask (batch, width) and response_mask (batch, tokens) of episodes given as ids.

    The masks come from lengths, so `pad_id` has no effect on any number. The tokenizer's pad id may be outside the embedding.
    """
    rows = [[*query, *answer] for query, answer in zip(queries, answers, strict=True)]
    input_ids, attention_mask = pad(rows, pad_id, multiple=TILE)
    lengths = torch.tensor([len(answer) for answer in answers])
    response_mask = length_mask(lengths, int(lengths.max()) if len(answers) else 0)
    return {"input_ids": input_ids, "attention_mask": attention_mask.long(), "response_mask": response_mask}


def trim_padding(episodes: dict[str, Tensor], multiple: int = 1) -> dict[str, Tensor]:
    """Return the episodes without columns that are padding in every row; the width is rounded up to the multiple."""
    width = -(-int(episodes["attention_mask"].sum(1).max()) // multiple) * multiple
    tokens = int(episodes["response_mask"].sum(1).max())
    widths = {name: width if name in FULL_WIDTH else tokens for name, tensor in episodes.items() if tensor.dim() > 1}
    return {name: tensor[:, : widths[name]] if name in widths else tensor for name, tensor in episodes.items()}


@torch.no_grad()
def in_batches(
    function: Callable[..., Sequence[Tensor]], episodes: dict[str, Tensor], batches: list[list[int]], multiple: int = 1
) -> list[Tensor]:
    """Run `function` on batches of the episodes without gradient, and return its outputs in the order of the rows.

    Args:
        function: takes the tensors of the episodes; each output is (rows, tokens), or (rows, width, ...).
        batches: row numbers; each row is in one batch.
        multiple: see `trim_padding`.
    """
    results: list[Tensor] = []
    for rows in batches:
        outputs = function(**trim_padding({name: tensor[rows] for name, tensor in episodes.items()}, multiple))
        if not results:
            # A 2-D output has one number per generated token, others one vector per position.
            shapes = [episodes["response_mask" if output.dim() == 2 else "input_ids"].shape for output in outputs]
            results = [each.new_zeros(*shape, *each.shape[2:]) for each, shape in zip(outputs, shapes, strict=True)]
        for target, output in zip(results, outputs, strict=True):
            target[rows, : output.shape[1]] = output
    return results


def finish_rollout(
    episodes: dict[str, Tensor],
    stopped: Tensor,
    scores: Tensor,
    log_probs: Tensor,
    reference_log_probs: Tensor,
    values: Tensor,
    options: RewardOptions,
    reduce: Reduce = identity,
    token_scores: Tensor | None = None,
) -> Rollout:
    """Compute token rewards and advantages, whiten the advantages over the episodes of all processes, and return the rollout.

    Args:
        episodes: from `pad_episodes`, with lower_states and baseline if there are any.
        stopped, scores: (batch,). log_probs, reference_log_probs, values: (batch, tokens).
        token_scores: (batch, tokens), rewards of single tokens.
    """
    mask = episodes["response_mask"]
    kl = torch.where(
        mask, kl_estimates(log_probs, reference_log_probs, options.kl_estimator), torch.zeros_like(log_probs)
    )
    scores = penalize_missing_eos(scores, stopped, options.missing_eos_penalty)
    rewards = token_rewards(scores, kl, mask, options.kl_coef, token_scores)
    if token_scores is not None:
        scores = scores + torch.where(mask, token_scores, torch.zeros_like(token_scores)).sum(dim=1)
    if options.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=reduce)
    raw = generalized_advantages(rewards, values, mask, options.gamma, options.lam)
    advantages = torch.where(mask, masked_whiten(raw, mask, reduce=reduce), torch.zeros_like(raw))
    return Rollout(
        **episodes, stopped=stopped, scores=scores, log_probs=log_probs, reference_log_probs=reference_log_probs,
        values=values, kl=kl, rewards=rewards, advantages=advantages, returns=raw + values,
    )  # fmt: skip
