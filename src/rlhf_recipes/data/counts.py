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

    def report(self, kind: str, count: int, message: str, *, of_rows: bool = True) -> None:
        """Add `count` to `kind` and log it as a warning: "<name>: <count> of <read> rows <message>". 0 says nothing.

        of_rows: what is counted are rows; otherwise the message names it.
        """
        if count:
            self[kind] += count
            counted = f"{count} of {self['read']} rows" if of_rows else str(count)
            logger.warning("%s: %s %s", self.name, counted, message)
