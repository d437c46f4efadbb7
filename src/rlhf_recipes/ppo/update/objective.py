"""What an optimizer step minimises, and what it shows on the way."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.roles.value import TokenOutputs
from rlhf_recipes.ppo.update.losses import policy_losses, value_losses


def objective(
    outputs: TokenOutputs, inputs: Mapping[str, Tensor], args: PPOConfig, tokens: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The PPO loss of one micro-batch, and its metrics, each (batch, tokens), under TRL's names.

    tokens: generated tokens of the whole minibatch, over all processes: the loss is this micro-batch's share of their
    mean. None: the micro-batch is all there is.
    """
    mask = inputs["response_mask"]
    policy = policy_losses(outputs.log_probs, inputs["log_probs"], inputs["advantages"], args.cliprange)
    value = value_losses(outputs.values, inputs["values"], inputs["returns"], args.cliprange_value)
    each = policy.losses + args.vf_coef * value.losses - args.entropy_coef * outputs.entropies
    tokens = mask.sum().clamp(min=1) if tokens is None else tokens
    losses = torch.where(mask, each, torch.zeros_like(each))
    loss = losses.sum() / tokens * args.world_size  # data parallelism averages what is to be added up
    log_ratio = outputs.log_probs.detach() - inputs["log_probs"]
    ratio = log_ratio.exp()
    return loss, {
        "policy/approxkl_avg": 0.5 * log_ratio**2,
        "policy/clipfrac_avg": policy.clipped,
        "policy/entropy_avg": outputs.entropies,
        "loss/policy_avg": policy.losses,
        "loss/value_avg": value.losses,
        "val/clipfrac_avg": value.clipped,
        "val/ratio": ratio,
        "val/ratio_var": ratio**2,  # less the squared mean, once that is known
    }
