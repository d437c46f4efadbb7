"""Import the public names of a package on first use. The root package, which may import nothing, does it itself."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` (PEP 562) that imports each name from its file on first use.

    Args:
        package: the dotted name of the package, its ``__name__``.
        names: for each file of the package, by its module name inside the package, the names that it defines.
    """
    module_of = {name: f"{package}.{file}" for file, defined in names.items() for name in defined}

    def getattr_(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattr_
