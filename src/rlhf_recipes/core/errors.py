"""Errors that a user can fix: one line that says what is wrong and what to do, exit code 2."""

import contextlib
import os
import sys
from collections.abc import Iterator

from rlhf_recipes.core.secrets import redact


class UserError(ValueError):
    """Something the caller can mend: one line that says what is wrong and what to do. A door exits with code 2."""


class RankError(UserError):
    """One that is about rows which only this process has, so that only it can tell."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError` that leaves this block into one line on stderr and exit code 2; end a run of processes."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {redact(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except SystemExit as ended:
        if line := getattr(ended, "line", None):  # told to end, and it has saved what it had
            if os.environ.get("RANK", "0") == "0":
                print(line, file=sys.stderr, flush=True)
            _leave_process_group()
        raise
    _leave_process_group()


def _leave_process_group() -> None:
    """Wait for the other processes of the run: one that exits with the group open sometimes aborts after its work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
