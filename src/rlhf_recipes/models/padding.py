"""Positions of tokens in rows that are padded on the left."""

import inspect
from typing import Any

from torch import nn

from rlhf_recipes.core.tensors import position_ids
from rlhf_recipes.core.unwrapping import base_model


def count_positions_from_mask_(model: nn.Module | None) -> None:
    """From now on `model(input_ids=..., attention_mask=...)` counts positions from each row's first real token.

    GPT-2 counts from the first column unless it is told. TRL's online trainers pad prompts on the left and do not tell
    it: the probabilities they learn from would be those of other positions than the answers were sampled at, by up to
    a nat and more an answer. Rows without padding, and calls that give `position_ids`, are read as before.
    """
    if model is not None and "position_ids" in inspect.signature(type(base_model(model)).forward).parameters:
        model.register_forward_pre_hook(_fill_positions, with_kwargs=True)


def _fill_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is not None and mask is not None and mask.shape == ids.shape and kwargs.get("position_ids") is None:
        kwargs = kwargs | {"position_ids": position_ids(mask)}
    return args, kwargs
