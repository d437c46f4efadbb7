"""SIGTERM: a process that is told to end finishes what it is at, and saves it."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_recipes.core.processes import is_main_process

ONE_REQUEST = 5.0  # seconds after a SIGTERM, within which another says nothing new

logger = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """The process was told to end (SIGTERM), and has saved what it had. Its exit code is the signal's, 143."""

    def __init__(self, line: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.line = line


@contextmanager
def on_sigterm(hear: Callable[[], None]) -> Iterator[None]:
    """For the time, the first SIGTERM calls `hear`, and a later one ends the process as ever.

    One that follows within seconds is the same request: a scheduler often tells every process of a job, and a launcher
    among them tells its workers once more.
    """
    first: float | None = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, frame: Any) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            if is_main_process():
                logger.warning("SIGTERM: the run ends after this optimizer step, with a checkpoint")
            hear()
        elif time.monotonic() - first > ONE_REQUEST:
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
