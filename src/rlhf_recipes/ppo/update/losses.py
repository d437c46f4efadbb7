"""The two losses of PPO, one value per token; the caller averages them over the generated tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLosses(NamedTuple):
    """losses and clipped: (batch, tokens); clipped is True where the clipped branch was the larger one."""

    losses: Tensor
    clipped: Tensor


def policy_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, cliprange: float) -> TokenLosses:
    """Return the negated clipped surrogate objective (Schulman et al. 2017, eq. 7). All tensors are (batch, tokens)."""
    ratio = torch.exp(log_probs - old_log_probs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return TokenLosses(torch.maximum(plain, clipped), clipped > plain)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float) -> TokenLosses:
    """Return half the squared error of the value or of the clipped value, whichever is larger.

    The clipped value differs from the old one by at most `cliprange_value`. The clipping is that of the PPO
    authors' code (Huang et al. 2022, detail 9). All tensors are (batch, tokens).
    """
    near_old = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = (values - returns) ** 2, (near_old - returns) ** 2
    return TokenLosses(0.5 * torch.maximum(plain, clipped), clipped > plain)
