"""Token rewards from the scores of answers; the KL coefficient and the score scale, which may change during a run."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_recipes.core.tensors import Reduce, identity


def kl_estimates(log_probs: Tensor, reference_log_probs: Tensor, estimator: str = "k1") -> Tensor:
    """Return per-token estimates of KL(policy || reference) at tokens sampled from the policy. All (batch, tokens).

    ``k1`` is the log-ratio: unbiased, positive or negative. ``k3`` is unbiased too and never negative (Schulman 2020,
    "Approximating KL divergence").
    """
    log_ratio = log_probs - reference_log_probs
    if estimator == "k1":
        return log_ratio
    return torch.exp(-log_ratio) - 1.0 + log_ratio


def penalize_missing_eos(scores: Tensor, stopped: Tensor, penalty: float | None) -> Tensor:
    """Subtract `penalty` from the score of each answer that no stop token ended. scores, stopped: (batch,)."""
    return scores if penalty is None else torch.where(stopped, scores, scores - penalty)


def token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, token_scores: Tensor | None = None
) -> Tensor:
    """Return the reward of each token: minus the KL penalty, plus the score on the last generated token.

    Source: Ziegler et al. 2019, section 2.1. The score of an answer without tokens is lost.

    Args:
        scores: (batch,). kl: (batch, tokens).
        mask: (batch, tokens), True on generated tokens, the stop token included.
        token_scores: (batch, tokens), rewards of single tokens, added to their tokens.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    if token_scores is not None:
        rewards = rewards + torch.where(mask, token_scores, torch.zeros_like(kl))
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    answered = mask.any(dim=1)
    rows = torch.arange(len(rewards), device=rewards.device)[answered]
    rewards[rows, last[answered]] += scores[answered].to(rewards.dtype)
    return rewards


class KLCoefficient:
    """The weight of the KL penalty: constant, or adapted towards a target KL (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, value: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Adapt the coefficient. kl: mean nats per answer in the last update, over all processes; episodes: in that update."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.value *= 1.0 + error * episodes / self.horizon


class ScoreScale:
    """Scales scores by their running standard deviation, and clips them.

    With `shift` the running mean is subtracted first (Huang et al. 2022, details 5 and 6 of continuous control; moments are
    merged as in Chan et al. 1979). clip: the lower and the upper bound, after scaling.
    """

    def __init__(self, scale: bool = False, shift: bool = False, clip: tuple[float, float] | None = None) -> None:
        self.use_scale, self.subtract_mean, self.clip = scale, shift, clip
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0  # squares: sum of squared distances from the mean

    def __call__(self, scores: Tensor, reduce: Reduce = identity, update: bool = True) -> Tensor:
        """Scale this process's scores, (batch,). update: add the scores of all processes to the moments first."""
        if self.use_scale and update:
            self._update(scores.double(), reduce)
        if self.use_scale and self.count > 1:
            centre = self.mean if self.subtract_mean else 0.0
            deviation = (self.squares / (self.count - 1)) ** 0.5
            scores = (scores - centre) / (deviation if deviation > 1e-8 else 1.0)  # 0 while all scores are equal
        return scores if self.clip is None else scores.clamp(*self.clip)

    def _update(self, scores: Tensor, reduce: Reduce) -> None:
        one = torch.ones((), dtype=torch.float64, device=scores.device)
        total, count = reduce(torch.stack([scores.sum(), one * len(scores)]))
        mean = total / count
        squares = reduce(((scores - mean) ** 2).sum())
        total_count, difference = self.count + count.item(), mean.item() - self.mean
        self.squares += squares.item() + difference**2 * self.count * count.item() / total_count
        self.mean += difference * count.item() / total_count
        self.count = total_count

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
