"""What a model does to its head's logits: soft-capping (Gemma 2, Team Gemma 2024, section 2) and scaling."""

from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.architectures import text_config

# Names in transformers' configs. A cap c gives c * tanh(logits / c).
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
MULTIPLIES_BY_SCALING = {"hyperclovax"}  # the same name, and the other operation
UNKNOWN_TO_TRL = ("logits_soft_cap", "output_logit_soft_cap")  # its fused head leaves these out
UNUSED = {"mpt"}  # has logit_scale in its config, which transformers' code does not read


def refuse_logits_unknown_to_trl(config: Any, name: str) -> None:
    """Refuse a model whose logits TRL's trainers would compute without their cap, as far as its config tells.

    Raises:
        UserError: names the model and the option.
    """
    option = next((each for each in UNKNOWN_TO_TRL if getattr(text_config(config), each, None)), None)
    if option is not None:
        raise UserError(
            f"model {name} caps its logits ({option}), which TRL's log-probabilities leave out; use pretrain or ppo"
        )


def transform_logits(config: Any, logits: Tensor) -> Tensor:
    """Return the logits that the model gives for its head's output. logits: (..., vocabulary)."""
    config = text_config(config)
    if config.model_type in UNUSED:
        return logits
    multiplies = config.model_type in MULTIPLIES_BY_SCALING
    for name in (*MULTIPLIERS, *DIVISORS):
        factor = getattr(config, name, None)
        if factor is not None and factor != 1:
            logits = logits * factor if name in MULTIPLIERS or multiplies else logits / factor
    for name in SOFT_CAPS:
        cap = getattr(config, name, None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
    return logits
