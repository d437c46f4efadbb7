"""Counts of what happened to the rows of a split, for the log and for metrics.json."""

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class RowCounts(Counter[str]):
    """How many rows of one split were read, dropped, cut and used. Keys are snake_case, as they stand in metrics.json.

    name: what the log calls the split ("the training split").
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def report(self, kind: str, count: int, message: str) -> None:
        """Add `count` to `kind` and log it as a warning: "<name>: <count> of <read> rows <message>". 0 says nothing."""
        if count:
            self[kind] += count
            logger.warning("%s: %d of %d rows %s", self.name, count, self["read"], message)


def counts_by_split(train: str = "the training split", test: str = "the held-out split") -> dict[str, RowCounts]:
    """Return new counts of the training and the held-out split, by `train` and `test`; the arguments are what logs call them."""
    return {"train": RowCounts(train), "test": RowCounts(test)}
