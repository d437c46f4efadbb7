"""How one file is read, before the files of a split become a `Source`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from rlhf_recipes.data.reading.source import Row


@dataclass(frozen=True)
class Reader:
    """Rows of one file.

    Args:
        read: returns a new iterator over the rows.
        columns: the names of the columns; None if they are known only after reading.
        length: the number of rows; None if it is known only after reading.
        label_names: the class names of ClassLabel columns, by column.
    """

    read: Callable[[], Iterator[Row]]
    columns: tuple[str, ...] | None = None
    length: int | None = None
    label_names: Mapping[str, list[str]] = field(default_factory=dict)
