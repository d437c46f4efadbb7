"""One pass over the rows of a source: what each column holds."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rlhf_recipes.data.forms.meanings import read_path
from rlhf_recipes.data.forms.messages import holds_messages
from rlhf_recipes.data.reading import Source

STREAM_ROWS = 1000  # rows of a stream that are looked at before it is read


@dataclass
class Column:
    """What a column holds, over all rows.

    kinds: counts of text, messages, number, bool, integers, list, object, other; rows without a value are not among them.
    values: distinct short values, at most `MOST_VALUES` and one. sample: the first value. filled: a value is not empty.
    whole: all numbers are integers. blank_texts: how many values are text without a character.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    values: set[Any] = field(default_factory=set)
    sample: Any = None
    filled: bool = False
    whole: bool = True
    blank_texts: int = 0

    @property
    def kind(self) -> str:
        """The kind of all values; `mixed` if they differ, `none` without any. Whole numbers and truth values may mix."""
        if not self.kinds:
            return "none"
        kinds = set(self.kinds)
        if self.blank_texts == self.kinds["text"]:  # cells of a table without a value
            kinds = kinds - {"text"} or kinds
        if kinds == {"bool", "number"} and self.whole:
            return "number"
        if kinds == {"integers", "list"}:
            return "list"
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def is_blank(self) -> bool:
        """Whether no row has a value, or only empty text, an empty list or an empty object."""
        return not self.kinds or not self.filled

    def add(self, value: Any) -> None:
        """Count one value."""
        if is_missing(value):
            return
        if not self.kinds:
            self.sample = value
        self.kinds[_kind(value)] += 1
        self.blank_texts += isinstance(value, str) and not value.strip()
        self.whole = self.whole and not isinstance(value, float)
        self.filled = self.filled or bool(value.strip() if isinstance(value, str) else value not in ([], {}, ()))
        if len(self.values) <= MOST_VALUES and isinstance(value, (str, int, float)) and len(str(value)) <= 40:
            self.values.add(value)


MOST_VALUES = 20


def survey(source: Source, dotted: Iterable[str] = (), limit: int | None = None) -> dict[str, Column]:
    """Return what each column holds in the first `limit` rows.

    dotted: paths into columns of objects (``info.post``) that are wanted as well.
    """
    columns = {name: Column() for name in source.columns}
    paths = [path for path in dotted if path not in columns]
    inner = {path: Column() for path in paths}
    for row in islice(source, limit):
        for name, value in row.items():
            columns.setdefault(name, Column()).add(value)
        for path in paths:
            inner[path].add(read_path(row, path))
    return columns | {path: column for path, column in inner.items() if column.kinds}


def is_missing(value: Any) -> bool:
    """Return whether a value stands for no value: None, an empty list, or NaN as pandas writes it."""
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    if holds_messages(value):
        return "messages"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, (list, tuple)):
        whole = bool(value) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
        return "integers" if whole else "list"
    return "object" if isinstance(value, Mapping) else "other"
