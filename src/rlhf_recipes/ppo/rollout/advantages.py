"""Advantages: how much better each token was than the value predicted."""

import torch
from torch import Tensor


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Return generalised advantage estimates (Schulman et al. 2016, eq. 16), computed from the last token back.

    All tensors are (batch, tokens); mask is True on generated tokens, which come first. values[:, t] is the value of
    the state that token t was chosen in. An episode ends with its last token: no value is bootstrapped after it.
    """
    values = torch.where(mask, values, torch.zeros_like(values))
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    advantages = torch.zeros_like(values)
    running = values.new_zeros(len(values))
    following = torch.zeros_like(running)
    for token in reversed(range(values.shape[1])):
        delta = rewards[:, token] + gamma * following - values[:, token]
        running = delta + gamma * lam * running
        following = values[:, token]
        advantages[:, token] = running
    return advantages
