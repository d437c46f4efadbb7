"""Tensors and arrays as plain Python values."""

from typing import Any


def to_python(value: Any) -> Any:
    """Return a tensor or array as nested lists, a scalar of either as a Python number, any other value unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value
