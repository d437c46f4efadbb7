"""Seconds of each phase of an update."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Measures the seconds of each phase of an update."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Return ``time/<phase>`` of each phase since the last call."""
        read, self._seconds = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}, {}
        return read
