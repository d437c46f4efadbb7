"""SIGTERM: request a stop, so that the run ends after the current optimizer step, with a checkpoint."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_recipes.core.processes import is_main_process

REPEAT_SECONDS = 5.0  # a SIGTERM within this time of the first one is the same request

logger = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """Raised after a run was stopped by SIGTERM and saved. The exit code is the signal's, 143; `line` is printed."""

    def __init__(self, line: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.line = line


@contextmanager
def on_sigterm(request_stop: Callable[[], None]) -> Iterator[None]:
    """Within this block the first SIGTERM calls `request_stop`, and a later one ends the process as usual.

    Signals within `REPEAT_SECONDS` of the first are ignored: a scheduler often signals every process of a job, and a
    launcher among them passes the signal on to its workers. Outside the main thread the block does nothing.
    """
    first_time: float | None = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        nonlocal first_time
        if first_time is None:
            first_time = time.monotonic()
            if is_main_process():
                logger.warning("SIGTERM: the run ends after this optimizer step, with a checkpoint")
            request_stop()
        elif time.monotonic() - first_time > REPEAT_SECONDS:
            signal.signal(signal.SIGTERM, previous_handler)
            os.kill(os.getpid(), signal.SIGTERM)

    previous_handler = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
