"""Lock an output folder for one run. The operating system releases the lock when its process ends for any reason."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rlhf_recipes.core.errors import UserError

LOCK_FILE = ".lock"
_locks: dict[Path, tuple[IO[str], int]] = {}  # this process's locks: open file, number of nested users


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Within this block, no other process can lock the folder. The same process may lock it again.

    Raises:
        UserError: another process holds the lock; the message names that process.
    """
    path = Path(folder).absolute()
    stream, count = _locks.get(path, (None, 0))
    if stream is None:
        path.mkdir(parents=True, exist_ok=True)
        stream = _open_locked(path / LOCK_FILE)
    _locks[path] = (stream, count + 1)
    try:
        yield
    finally:
        stream, count = _locks.pop(path)
        if count > 1:
            _locks[path] = (stream, count - 1)
        else:
            with suppress(OSError):  # on a read-only disk the file stays; an unlocked file is harmless
                (path / LOCK_FILE).unlink()  # before the release, so as not to delete another process's new file
            stream.close()


def require_unlocked(folder: str | Path) -> None:
    """Refuse a folder that another process has locked. Nothing is written.

    Raises:
        UserError: another process holds the lock.
    """
    path = Path(folder).absolute()
    if path in _locks or not (path / LOCK_FILE).is_file():
        return
    with (path / LOCK_FILE).open("r", encoding="utf-8") as stream:
        # A shared lock: processes of one run may check at the same time, and on NFS a file that is open for
        # reading only cannot be locked exclusively (flock(2)).
        _lock(stream, path, fcntl.LOCK_SH)


def _open_locked(path: Path) -> IO[str]:
    """Create and lock the lock file, and write the process into it."""
    while True:
        stream = path.open("a+", encoding="utf-8")
        _lock(stream, path.parent, fcntl.LOCK_EX, timeout=1.0)  # `require_unlocked` holds it for a moment
        # The previous holder may have deleted the file between open and lock.
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            break
        stream.close()
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream


def _lock(stream: IO[str], folder: Path, operation: int, timeout: float = 0.0) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return fcntl.flock(stream, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
        stream.seek(0)
        owner = stream.read().strip() or "another process"
        raise UserError(
            f"output folder {folder} is in use by {owner}; choose another --output_dir, or wait until it ends"
        )
