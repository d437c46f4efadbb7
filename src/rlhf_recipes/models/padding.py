"""Position ids for rows that are padded on the left."""

import inspect
from typing import Any

from torch import nn

from rlhf_recipes.core.tensors import position_ids
from rlhf_recipes.core.unwrapping import base_model


def count_positions_from_mask_(model: nn.Module | None) -> None:
    """Add a hook to the model that computes missing `position_ids` from `attention_mask`, without the padding.

    GPT-2 counts positions from the first column by default. TRL's online trainers pad prompts on the left and pass no
    `position_ids`. Training would then see other positions than sampling did; the log-probability of an answer differs
    by one nat or more. Rows without padding, and calls that pass `position_ids`, give the same results as before.
    A model without `position_ids`, or None, is not changed.
    """
    if model is not None and "position_ids" in inspect.signature(type(base_model(model)).forward).parameters:
        model.register_forward_pre_hook(_fill_positions, with_kwargs=True)


def _fill_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is not None and mask is not None and mask.shape == ids.shape and kwargs.get("position_ids") is None:
        kwargs = kwargs | {"position_ids": position_ids(mask)}
    return args, kwargs
