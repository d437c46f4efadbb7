"""From one score an answer to one reward a token."""

import torch
from torch import Tensor


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


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The reward of each token: minus the KL penalty everywhere, plus the score on the last generated token.

    scores: (batch,); kl, mask: (batch, tokens), mask True on the generated tokens, the stop token among them. An
    answer without tokens has nowhere to put its score (Ziegler et al. 2019, section 2.1).
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    some = mask.any(dim=1)
    rewards[torch.arange(len(rewards), device=rewards.device)[some], last[some]] += scores[some].to(rewards.dtype)
    return rewards
