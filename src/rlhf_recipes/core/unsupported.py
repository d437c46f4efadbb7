"""Options that a dataclass inherits from a library and that a stage cannot honour."""

from dataclasses import MISSING, fields
from typing import Any


def unsupported_options(dataclass_type: type) -> dict[str, str]:
    """Return the inherited options that a stage refuses, each with what follows its name in the message.

    They are the entries of `unsupported`, a class attribute of the dataclass and of its bases. They are not in --help.
    """
    merged: dict[str, str] = {}
    for each in reversed(dataclass_type.__mro__):
        merged |= vars(each).get("unsupported", {})
    return merged


def requested_unsupported(instance: Any) -> list[str]:
    """Return the names of the unsupported options whose value in a dataclass instance is not the default."""
    defaults = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(instance)
        if item.name in unsupported_options(type(instance))
    }
    return [name for name, default in defaults.items() if getattr(instance, name) != default]
