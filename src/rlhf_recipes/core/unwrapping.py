"""Find the transformers model inside an adapter wrapper, and the trunk inside that model."""

from typing import Any

from torch import nn


def base_model(model: nn.Module) -> Any:
    """Return the transformers model inside an adapter wrapper, or the model itself if it has no adapter."""
    return model.get_base_model() if "get_base_model" in dir(model) else model  # type: ignore[operator]


def trunk_of(model: nn.Module) -> Any:
    """Return the transformer without its head."""
    base = base_model(model)
    return getattr(base, base.base_model_prefix)
