"""One split of a dataset as it was read: rows of Python values, with nothing renamed, converted or dropped."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows of one split. Iterating starts over each time.

    Args:
        name: what messages call it, such as ``data/train.jsonl``.
        read: returns a new iterator over the rows.
        columns: the names of the columns, in the order of their first appearance.
        label_names: the class names of a ClassLabel column, by column.
        length: the number of rows; None for a stream.
    """

    name: str
    read: Callable[[], Iterator[Row]]
    columns: tuple[str, ...]
    label_names: Mapping[str, list[str]] = field(default_factory=dict)
    length: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return self.read()
