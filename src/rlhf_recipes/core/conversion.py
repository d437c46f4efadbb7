"""Tensors, arrays and enum members as plain Python values."""

from enum import Enum
from typing import Any


def to_python(value: Any) -> Any:
    """Return a tensor or array as nested lists, a scalar of either as a Python number, any other value unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def without_enums(value: Any) -> Any:
    """Return the value with its enum members, also those in a list, as plain values."""
    if isinstance(value, list):
        return [without_enums(item) for item in value]
    return value.value if isinstance(value, Enum) else value
