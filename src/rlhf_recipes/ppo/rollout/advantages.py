"""How much better each token turned out than the value model expected."""

import torch
from torch import Tensor


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), computed from the last token back.

    All tensors are (batch, tokens); mask is True on generated tokens, which come first. values[:, t] is the value of
    the state that token t was chosen in. After its last token an episode is over: nothing is bootstrapped beyond it.
    """
    values = torch.where(mask, values, torch.zeros_like(values))
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0]) if values.shape[1] else values.sum(dim=1)
    following = torch.zeros_like(running)
    for token in reversed(range(values.shape[1])):
        surprise = rewards[:, token] + gamma * following - values[:, token]
        running = surprise + gamma * lam * running
        following = values[:, token]
        advantages[:, token] = running
    return advantages
