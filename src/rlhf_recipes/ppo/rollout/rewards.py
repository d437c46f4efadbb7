"""From one score an answer to one reward a token, and the two numbers of that which may move during a run."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_recipes.core.tensors import Reduce, identity


def kl_estimates(log_probs: Tensor, reference_log_probs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimates of KL(policy || reference) at tokens drawn from the policy. All (batch, tokens).

    ``k1`` is the log-ratio: unbiased, of either sign. ``k3`` is unbiased too and never negative (Schulman 2020,
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
    """The reward of each token: minus the KL penalty everywhere, plus the score on the last generated token.

    scores: (batch,); kl, mask: (batch, tokens), mask True on the generated tokens, the stop token among them. An
    answer without tokens has nowhere to put its score (Ziegler et al. 2019, section 2.1). token_scores: (batch, tokens),
    what rewards of single tokens add where they stand.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    if token_scores is not None:
        rewards = rewards + torch.where(mask, token_scores, torch.zeros_like(kl))
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    some = mask.any(dim=1)
    rewards[torch.arange(len(rewards), device=rewards.device)[some], last[some]] += scores[some].to(rewards.dtype)
    return rewards


class KLCoefficient:
    """The weight of the KL penalty: fixed, or steered towards a target KL (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, value: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """kl: nats an answer that the last update's episodes were measured at, of all processes."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.value *= 1.0 + error * episodes / self.horizon


class ScoreScale:
    """Brings scores to unit variance, by what was seen in the run so far, and holds them in a range.

    Scores are divided by their running standard deviation; with `shift` their running mean is subtracted first
    (Huang et al. 2022, details 5 and 6 of continuous control; the merging of moments is that of Chan et al. 1979).
    """

    def __init__(self, scale: bool = False, shift: bool = False, held: tuple[float, float] | None = None) -> None:
        self.scale, self.shift, self.held = scale, shift, held
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0  # squares: sum of squared distances from the mean

    def __call__(self, scores: Tensor, reduce: Reduce = identity, learn: bool = True) -> Tensor:
        """scores: (batch,) of this process. learn: take the scores of all processes into account, before scaling."""
        if self.scale and learn:
            self._learn(scores.double(), reduce)
        if self.scale and self.count > 1:
            centre = self.mean if self.shift else 0.0
            deviation = (self.squares / (self.count - 1)) ** 0.5
            scores = (scores - centre) / (deviation if deviation > 1e-8 else 1.0)  # scores that never differed
        return scores if self.held is None else scores.clamp(*self.held)

    def _learn(self, scores: Tensor, reduce: Reduce) -> None:
        one = torch.ones((), dtype=torch.float64, device=scores.device)
        total, count = reduce(torch.stack([scores.sum(), one * len(scores)]))
        mean = total / count
        squares = reduce(((scores - mean) ** 2).sum())
        everyone, distance = self.count + count.item(), mean.item() - self.mean
        self.squares += squares.item() + distance**2 * self.count * count.item() / everyone
        self.mean += distance * count.item() / everyone
        self.count = everyone

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
