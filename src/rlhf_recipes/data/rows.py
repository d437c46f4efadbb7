"""The rows of a dataset: which columns they have, which of them are kept, and how they are written."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.files import write_text


def parse_row_filter(conditions: Sequence[str]) -> dict[str, set[str]]:
    """Parse ``["source=imdb", "source=web"]`` to ``{"source": {"imdb", "web"}}``: allowed values by column."""
    rules: dict[str, set[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not column or not equals:
            raise UserError(f"row_filter {condition!r} is not of the form column=value; write --row_filter source=web")
        rules.setdefault(column, set()).add(value)
    return rules


def matches_filter(value: Any, allowed: set[str], label_names: Sequence[str] | None = None) -> bool:
    """Return whether a value is one of the allowed ones, compared as text; true and True are the same.

    label_names: the class names of a ClassLabel column; either a name or a number matches.
    """
    if isinstance(value, bool):
        return str(value).lower() in {each.lower() for each in allowed} or str(int(value)) in allowed
    named = label_names is not None and isinstance(value, int) and 0 <= value < len(label_names)
    return str(value) in allowed or bool(named and label_names is not None and label_names[value] in allowed)


def first_row(dataset: Any) -> dict[str, Any] | None:
    """Return the first row, or None without rows."""
    return next(iter(dataset), None)


def require_columns(dataset: Any, *choices: Sequence[str], role: str = "dataset") -> Sequence[str]:
    """Return the first of `choices`, each a set of column names, that the dataset has.

    Raises:
        UserError: it has none of them; the message lists the columns that exist.
    """
    row = first_row(dataset)
    for columns in choices:
        if row is not None and all(column in row for column in columns):
            return columns
    needed = " or ".join("+".join(columns) for columns in choices)
    present = ", ".join(row or {})
    raise UserError(f"{role} needs the columns {needed}, but has {present}; rename them or give another dataset")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON Lines atomically and return the path."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
