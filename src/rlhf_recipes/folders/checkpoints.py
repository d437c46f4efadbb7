"""Checkpoints that are whole or not there at all, and the last one that can be trusted.

A checkpoint is written beside its place, flushed to the disk, sealed with the SHA-256 of every file in it, and only then
renamed. Whatever ends the process before that leaves the checkpoints that were there as they were.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_recipes.core.errors import RankError, UserError

STATE_FILE = "trainer_state.json"  # which Trainer writes last
CHECKSUMS_FILE = "SHA256SUMS"  # as `sha256sum -c` reads it
STAGING_FOLDER = ".saving"  # where a checkpoint is until it is whole
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
NO_ACCESS_ERRNOS = {errno.EACCES, errno.EPERM, errno.EIO}
# What could be read as weights. What Accelerate saves of FSDP, pytorch_model_fsdp.bin, is a state that it reads without code.
PICKLE_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin", "*.pkl", "*.pickle")

logger = logging.getLogger(__name__)


def write_checksums(folder: Path) -> None:
    """Flush every file of the folder to the disk, and leave the sum of each in SHA256SUMS."""
    lines = [f"{_sum_of(path, flush=True)}  {path.relative_to(folder).as_posix()}" for path in _files_in(folder)]
    sums = folder / CHECKSUMS_FILE
    sums.write_text("\n".join([*lines, ""]), encoding="utf-8")
    for path in (sums, folder, *(each for each in folder.rglob("*") if each.is_dir())):
        _flush(path)


def publish(staged: Path, place: Path) -> None:
    """Seal a folder and rename it to its place; one that is there already makes way."""
    write_checksums(staged)
    if place.exists():
        old = staged.with_name(f"{staged.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    staged.rename(place)
    _flush(place.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def move_files_into(staged: Path, folder: Path) -> None:
    """Bring the files of a staged folder into `folder`, each of them whole; the weights come last."""
    files = sorted(_files_in(staged), key=lambda path: (path.suffix == ".safetensors", path))
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        target = folder / path.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    _flush(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None. One of a plain `Trainer` has no sums to compare."""
    if pickled := next((path for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)), None):
        return f"{pickled.name} is a pickle, which could run code while it is read"
    try:
        if not isinstance(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")), dict):
            return f"{STATE_FILE} is not what Trainer writes"
        for name, expected in _sums_in(folder):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sum_of(folder / name) != expected:
                return f"{name} is not what was saved (its SHA-256 differs)"
    except (OSError, ValueError) as error:
        return f"{STATE_FILE} or {CHECKSUMS_FILE} cannot be read ({str(error).splitlines()[0]})"
    return None


def find_checkpoint(resume_from_checkpoint: str | bool | None, folder: str | Path) -> str | None:
    """The checkpoint folder to go on from, or None.

    Args:
        resume_from_checkpoint: ``True``: the last whole one in `folder`, which must have one. ``"auto"``: that, or None
            where there is none. A path: that one. ``None`` or ``False``: None. A checkpoint that is damaged is named
            in the log, and the one before it is taken.

    Raises:
        UserError: there is no such checkpoint, or the one that was named is damaged.
    """
    asked = str(resume_from_checkpoint).lower()
    if asked in ("none", "false"):
        return None
    if asked not in ("true", "auto"):
        point = Path(str(resume_from_checkpoint))
        if not (point / STATE_FILE).is_file():
            raise UserError(f"--resume_from_checkpoint {point} is no checkpoint folder; give one that a run has saved")
        if why := find_damage(point):
            raise UserError(f"checkpoint {point} is damaged: {why}; give another, or --resume auto to have one chosen")
        return str(point)
    damaged = 0
    for point in list_checkpoints(folder):
        why = find_damage(point)
        if why is None:
            return str(point)
        damaged += 1
        logger.warning("checkpoint %s is damaged and is passed over: %s", point, why)
    if damaged:
        raise UserError(
            f"none of the {damaged} checkpoints in {folder} is whole; start again with --overwrite true and without "
            "--resume, or in another --output_dir"
        )
    if asked == "true":
        raise UserError(f"output folder {folder} has no checkpoint to resume from; leave --resume_from_checkpoint out")
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run, the last one first."""
    points = [
        (int(number), path)
        for path in Path(folder).glob("checkpoint-*")
        if path.is_dir() and (number := path.name.removeprefix("checkpoint-")).isdigit()
    ]
    return [path for _, path in sorted(points, reverse=True)]


def raise_if_disk_full(error: Exception, run: Path, step: int) -> None:
    """One line in place of a trace, where the disk did not take a checkpoint; makes room of what was half written.

    Raises:
        RankError: that it is the disk, from the process that met it.
    """
    if (isinstance(error, OSError) and error.errno in NO_ACCESS_ERRNOS) or _is_disk_full(error):
        raise _could_not_write(f"checkpoint-{step}", run, error) from error


@contextmanager
def disk_full_as_user_error(run: Path) -> Iterator[None]:
    """For the time, a disk that takes no more, whatever was written to it, ends the run in one line.

    Raises:
        RankError: that it is the disk.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _is_disk_full(error):
            raise
        raise _could_not_write("a file", run, error) from error


def _is_disk_full(error: Exception) -> bool:
    words = ("No space left", "File too large", "PytorchStreamWriter", "Disk quota", "Read-only file system")
    told = str(error)
    return (isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS) or any(word in told for word in words)


def _could_not_write(what: str, run: Path, error: Exception) -> RankError:
    shutil.rmtree(run / STAGING_FOLDER, ignore_errors=True)
    points = list_checkpoints(run)
    kept = f"{points[0]} is whole, go on from it with --resume auto" if points else "no checkpoint is there yet"
    return RankError(f"{what} could not be written to {run} ({str(error).splitlines()[0]}); make room there: {kept}")


def raise_if_out_of_memory(error: Exception, run: str | Path, step: int) -> None:
    """One line in place of a trace, from the process whose memory it was.

    Raises:
        RankError: that it is memory.
    """
    import torch

    lines = str(error).splitlines() or ["no memory is left"]
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in lines[0]:
        return
    raise RankError(
        f"step {step}: out of memory ({lines[0]}){last_checkpoint_note(run)}; lower --per_device_train_batch_size (with global_batch_size "
        "the run stays the same) or add --gradient_checkpointing true, and go on with --resume auto"
    ) from error


def last_checkpoint_note(run: str | Path) -> str:
    """The last checkpoint of a run, in words that go on a line about it."""
    points = list_checkpoints(run)
    return f"; {points[0]} is the last checkpoint" if points else ""


def _files_in(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)


def _sums_in(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / CHECKSUMS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        expected, _, name = line.partition("  ")
        yield name, expected


def _sum_of(path: Path, flush: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
        if flush:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
