"""The loss of one micro-batch, and the metrics that it gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.ppo.update.losses import policy_losses, value_losses


@dataclass(frozen=True)
class LossOptions:
    """The options of the loss, under the names of `PPOConfig`."""

    cliprange: float
    cliprange_value: float
    vf_coef: float
    entropy_coef: float


def objective(
    log_probs: Tensor,
    entropies: Tensor,
    values: Tensor,
    inputs: Mapping[str, Tensor],
    options: LossOptions,
    tokens: Any = None,
    world_size: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the PPO loss of one micro-batch, and its metrics under TRL's names, (batch, tokens) each.

    Args:
        log_probs, entropies, values: of the generated tokens under the current weights, (batch, tokens) each.
        inputs: the episodes as the rollout recorded them (see `Rollout`).
        tokens: the number of generated tokens in the whole minibatch, over all processes; the sum over this micro-batch is
            divided by it. None: the micro-batch is the whole minibatch.
        world_size: the loss is multiplied by it: data parallelism averages gradients over processes, but their sum is needed.
    """
    mask = inputs["response_mask"]
    policy = policy_losses(log_probs, inputs["log_probs"], inputs["advantages"], options.cliprange)
    value = value_losses(values, inputs["values"], inputs["returns"], options.cliprange_value)
    token_losses = policy.losses + options.vf_coef * value.losses - options.entropy_coef * entropies
    tokens = mask.sum().clamp(min=1) if tokens is None else tokens
    loss = torch.where(mask, token_losses, torch.zeros_like(token_losses)).sum() / tokens * world_size
    log_ratio = log_probs.detach() - inputs["log_probs"]
    ratio = log_ratio.exp()
    return loss, {
        "policy/approxkl_avg": 0.5 * log_ratio**2,
        "policy/clipfrac_avg": policy.clipped,
        "policy/entropy_avg": entropies,
        "loss/policy_avg": policy.losses,
        "loss/value_avg": value.losses,
        "val/clipfrac_avg": value.clipped,
        "val/ratio": ratio,
        "val/ratio_var": ratio**2,  # `UpdateMetrics` subtracts the squared mean
    }
