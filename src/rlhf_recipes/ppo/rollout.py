"""One update's worth of episodes: what was asked, what was answered, and what it was worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.generation import Completions
from rlhf_recipes.ppo.advantages import generalized_advantages
from rlhf_recipes.ppo.rewards import kl_estimates, penalize_missing_eos, token_rewards
from rlhf_recipes.tensors import Reduce, alone, length_mask, masked_mean, masked_whiten, pad

WHOLE_ROWS = ("input_ids", "attention_mask")  # as wide as query and answer; all else is as wide as the answer


@dataclass
class Rollout:
    """Tensors of one process's episodes: each query and its answer from the first column on, then padding.

    Nothing real stands to the right of padding, so a causal model needs no mask for it.
    """

    input_ids: Tensor  # (batch, width) long; width: tokens of the longest query and answer together
    attention_mask: Tensor  # (batch, width) long
    response_mask: Tensor  # (batch, tokens) bool: generated tokens, the stop token among them
    stopped: Tensor  # (batch,) bool: ended by a stop token
    scores: Tensor  # (batch,) float32: what the whole answer earned, its tokens and the missing-EOS penalty included
    log_probs: Tensor  # (batch, tokens) float32, like all below
    reference_log_probs: Tensor
    values: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, rows: Tensor) -> dict[str, Tensor]:
        """The episodes of one micro-batch, as the mapping that `compute_loss` takes, no wider than they need be."""
        return narrowed({item.name: getattr(self, item.name)[rows] for item in fields(self)})

    def by_length(self, rows: Tensor) -> Tensor:
        """Those rows, the shortest episode first."""
        return rows[self.attention_mask[rows].sum(1).argsort(stable=True).to(rows.device)]

    def episode_metrics(self, kl_coef: float) -> dict[str, Tensor]:
        """What the field logs of each episode, (batch,) each, under TRL's names."""
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

    def explained_variance(self, reduce: Reduce = alone) -> float:
        """Share of the returns' variance that the values foresaw, over the tokens of all processes; 1 is perfect."""
        mask = self.response_mask
        spread = masked_mean((self.returns - masked_mean(self.returns, mask, reduce)) ** 2, mask, reduce)
        error = masked_mean((self.returns - self.values) ** 2, mask, reduce)
        return float(1.0 - error / spread.clamp(min=1e-8))


@dataclass(frozen=True)
class RewardShape:
    """The numbers that turn scores into advantages."""

    kl_coef: float
    kl_estimator: str
    gamma: float
    lam: float
    whiten_rewards: bool
    missing_eos_penalty: float | None

    @classmethod
    def of(cls, config: Any, **moved: float) -> "RewardShape":
        """Those numbers of a `PPOConfig`, but for those that have moved since."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)} | moved)


def as_samples(
    prompts: Sequence[Any], texts: Sequence[str], scores: Mapping[str, Sequence[Any]], completions: Completions
) -> list[dict[str, Any]]:
    """One row an episode: its prompt, its answer in words, its tokens, whether it ended, and its score by each reward."""
    lengths = [len(ids) for ids in completions.ids]
    return [
        {"prompt": prompt, "completion": text, "tokens": length, "stopped": stopped}
        | {name: values[row] for name, values in scores.items()}
        for row, (prompt, text, length, stopped) in enumerate(
            zip(prompts, texts, lengths, completions.stopped, strict=True)
        )
    ]


def pack_episodes(
    queries: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask (batch, width) and response_mask (batch, tokens) of episodes given as ids.

    pad_id fills the gaps and is looked at by nobody: the masks come from the lengths. So it need not be the
    tokenizer's, which may lie beyond the embedding.
    """
    input_ids, attention_mask = pad([[*query, *answer] for query, answer in zip(queries, answers, strict=True)], pad_id)
    lengths = torch.tensor([len(answer) for answer in answers])
    return input_ids, attention_mask.long(), length_mask(lengths, int(lengths.max()) if len(answers) else 0)


def narrowed(episodes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Episodes without the columns that are padding in all of them."""
    width = int(episodes["attention_mask"].sum(1).max())
    tokens = int(episodes["response_mask"].sum(1).max())
    cut = {name: width if name in WHOLE_ROWS else tokens for name, tensor in episodes.items() if tensor.dim() > 1}
    return {name: tensor[:, : cut[name]] if name in cut else tensor for name, tensor in episodes.items()}


def finish_rollout(
    episodes: tuple[Tensor, Tensor, Tensor],
    stopped: Tensor,
    scores: Tensor,
    log_probs: Tensor,
    reference_log_probs: Tensor,
    values: Tensor,
    shape: RewardShape,
    reduce: Reduce = alone,
    token_scores: Tensor | None = None,
) -> Rollout:
    """Shape rewards, estimate advantages, whiten them over the episodes of all processes, and put it all together.

    scores: (batch,), of whole answers; token_scores: (batch, tokens), what single tokens earned besides.
    """
    input_ids, attention_mask, mask = episodes
    kl = torch.where(
        mask, kl_estimates(log_probs, reference_log_probs, shape.kl_estimator), torch.zeros_like(log_probs)
    )
    scores = penalize_missing_eos(scores, stopped, shape.missing_eos_penalty)
    rewards = token_rewards(scores, kl, mask, shape.kl_coef, token_scores)
    if token_scores is not None:
        scores = scores + torch.where(mask, token_scores, torch.zeros_like(token_scores)).sum(dim=1)
    if shape.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=reduce)
    raw = generalized_advantages(rewards, values, mask, shape.gamma, shape.lam)
    advantages = torch.where(mask, masked_whiten(raw, mask, reduce=reduce), torch.zeros_like(raw))
    return Rollout(
        input_ids, attention_mask, mask, stopped, scores, log_probs, reference_log_probs, values, kl,
        rewards, advantages, returns=raw + values,
    )  # fmt: skip
