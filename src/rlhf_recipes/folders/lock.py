"""One run in a folder: a lock that ends with the process that holds it, however that ends."""

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
_held: dict[Path, tuple[IO[str], int]] = {}  # of this process: the open file, and how many ask for it


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """For the time, no other process runs in the folder. One process may ask for the same folder again.

    Raises:
        UserError: another process is at it; names it.
    """
    path = Path(folder).absolute()
    stream, count = _held.get(path, (None, 0))
    if stream is None:
        path.mkdir(parents=True, exist_ok=True)
        stream = _locked(path / LOCK_FILE)
    _held[path] = (stream, count + 1)
    try:
        yield
    finally:
        stream, count = _held.pop(path)
        if count > 1:
            _held[path] = (stream, count - 1)
        else:
            with suppress(OSError):  # a file that must stay where nothing can be written locks nobody out
                (path / LOCK_FILE).unlink()  # while it is held, so that nobody's new one is taken away
            stream.close()


def require_unlocked(folder: str | Path) -> None:
    """Refuse a folder that another process runs in. Writes nothing."""
    path = Path(folder).absolute()
    if path in _held or not (path / LOCK_FILE).is_file():
        return
    with (path / LOCK_FILE).open("r", encoding="utf-8") as stream:
        # Shared, so that processes of one run that look at the same time see no other run in one another, and since a file
        # that is open for reading alone cannot be locked in another way on every disk (flock(2), on NFS).
        _lock(stream, path, fcntl.LOCK_SH)


def _locked(path: Path) -> IO[str]:
    while True:
        stream = path.open("a+", encoding="utf-8")
        _lock(stream, path.parent, fcntl.LOCK_EX, patience=1.0)  # somebody may just look
        # The one before may have taken the file away between its opening and its locking.
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            break
        stream.close()
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream


def _lock(stream: IO[str], folder: Path, kind: int, patience: float = 0.0) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
        stream.seek(0)
        owner = stream.read().strip() or "another process"
        raise UserError(
            f"output folder {folder} is in use by {owner}; choose another --output_dir, or wait until it has ended"
        )
