"""Errors that the user can fix: one line with the problem and the fix, and exit code 2."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rlhf_recipes.core.processes import is_main_process
from rlhf_recipes.core.secrets import redact


class UserError(ValueError):
    """An error that the caller can fix: one line that says what is wrong, then the fix. Recipes exit with code 2."""


class RankError(UserError):
    """A `UserError` that only this process can report, for example about rows that only this process has."""


def shortened(value: Any, length: int = 60) -> str:
    """Return a value as it is shown in an error message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Within this block, a `UserError` becomes one line on stderr and exit code 2.

    Of several processes, only rank 0 prints the line, unless it is a `RankError`. At the end of the block the process
    leaves its process group.

    Raises:
        SystemExit: exit code 2 for a `UserError`.
    """
    try:
        yield
    except UserError as error:
        if is_main_process() or isinstance(error, RankError):
            print(f"error: {redact(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if line := getattr(stop, "line", None):  # stopped by SIGTERM, with a checkpoint saved
            if is_main_process():
                print(line, file=sys.stderr, flush=True)
            _leave_process_group()
        raise
    _leave_process_group()


def _leave_process_group() -> None:
    """Wait for all processes, then destroy the process group; a process that exits without this sometimes aborts."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
