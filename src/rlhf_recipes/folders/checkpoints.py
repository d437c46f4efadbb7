"""Write checkpoints atomically, verify them, and find the last intact one.

A checkpoint is written to a staging folder and flushed to the disk, with the SHA-256 of each file. Only then is it
renamed. If the process ends before that, the existing checkpoints are unchanged.
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

STATE_FILE = "trainer_state.json"  # the file that Trainer writes last
CHECKSUMS_FILE = "SHA256SUMS"  # in the format of `sha256sum -c`
STAGING_FOLDER = ".saving"  # holds a checkpoint until it is complete
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
NO_ACCESS_ERRNOS = {errno.EACCES, errno.EPERM, errno.EIO}
# Pickles that could be loaded as weights. Accelerate loads its pytorch_model_fsdp.bin with weights_only.
PICKLE_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin", "*.pkl", "*.pickle")

logger = logging.getLogger(__name__)


def write_checksums(folder: Path) -> None:
    """Flush every file of the folder to the disk, and write their SHA-256 sums to SHA256SUMS."""
    lines = [f"{_sha256(path, flush=True)}  {path.relative_to(folder).as_posix()}" for path in _files_in(folder)]
    sums = folder / CHECKSUMS_FILE
    sums.write_text("\n".join([*lines, ""]), encoding="utf-8")
    for path in (sums, folder, *(subfolder for subfolder in folder.rglob("*") if subfolder.is_dir())):
        _flush(path)


def publish(staged: Path, target: Path) -> None:
    """Write the checksums of a staged folder and rename it to `target`, replacing a folder of that name."""
    write_checksums(staged)
    if target.exists():
        old = staged.with_name(f"{staged.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    staged.rename(target)
    _flush(target.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def move_files_into(staged: Path, folder: Path) -> None:
    """Move the files of a staged folder into `folder`, each one atomically; the weights come last."""
    files = sorted(_files_in(staged), key=lambda path: (path.suffix == ".safetensors", path))
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        target = folder / path.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    _flush(folder)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is intact. One of a plain `Trainer` has no checksums."""
    if pickled := next((path for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)), None):
        return f"{pickled.name} is a pickle, which could run code while it is loaded"
    try:
        if not isinstance(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")), dict):
            return f"{STATE_FILE} is no state of a Trainer"
        for name, expected in _read_checksums(folder):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != expected:
                return f"{name} differs from the saved file (by its SHA-256)"
    except (OSError, ValueError) as error:
        return f"{STATE_FILE} or {CHECKSUMS_FILE} cannot be read ({str(error).splitlines()[0]})"
    return None


def find_checkpoint(resume_from_checkpoint: str | bool | None, folder: str | Path) -> str | None:
    """Return the checkpoint folder to resume from, or None.

    Args:
        resume_from_checkpoint: ``True``: the last intact checkpoint in `folder`, which must have one. ``"auto"``: the
            last intact one, or None if there is none. A path: that checkpoint. ``None`` or ``False``: None.
        folder: the run's output folder. Damaged checkpoints in it are logged and skipped.

    Raises:
        UserError: there is no such checkpoint, or the checkpoint at the given path is damaged.
    """
    requested = str(resume_from_checkpoint).lower()
    if requested in ("none", "false"):
        return None
    if requested not in ("true", "auto"):
        checkpoint = Path(str(resume_from_checkpoint))
        if not (checkpoint / STATE_FILE).is_file():
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is no checkpoint folder; give one that a run saved"
            )
        if damage := find_damage(checkpoint):
            raise UserError(
                f"checkpoint {checkpoint} is damaged: {damage}; give another one, or use the last intact one with "
                "--resume auto"
            )
        return str(checkpoint)
    damaged = 0
    for checkpoint in list_checkpoints(folder):
        damage = find_damage(checkpoint)
        if damage is None:
            return str(checkpoint)
        damaged += 1
        logger.warning("checkpoint %s is damaged and is skipped: %s", checkpoint, damage)
    if damaged:
        raise UserError(
            f"none of the {damaged} checkpoints in {folder} is intact; start again with --overwrite true and without "
            "--resume, or in another --output_dir"
        )
    if requested == "true":
        raise UserError(f"output folder {folder} has no checkpoint to resume from; leave --resume_from_checkpoint out")
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, the last one first."""
    checkpoints = [
        (int(number), path)
        for path in Path(folder).glob("checkpoint-*")
        if path.is_dir() and (number := path.name.removeprefix("checkpoint-")).isdigit()
    ]
    return [path for _, path in sorted(checkpoints, reverse=True)]


def raise_if_disk_full(error: Exception, run: Path, step: int) -> None:
    """Delete the staging folder and raise a one-line error, if `error` says that the disk cannot store a checkpoint.

    Raises:
        RankError: the disk is full or cannot be written; raised by the process with the error.
    """
    if (isinstance(error, OSError) and error.errno in NO_ACCESS_ERRNOS) or _is_disk_full(error):
        raise _write_error(f"checkpoint-{step}", run, error) from error


@contextmanager
def disk_full_as_user_error(run: Path) -> Iterator[None]:
    """Within this block, any error of a full disk is raised as a one-line error.

    Raises:
        RankError: the disk is full or cannot be written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _is_disk_full(error):
            raise
        raise _write_error("a file", run, error) from error


def _is_disk_full(error: Exception) -> bool:
    words = ("No space left", "File too large", "PytorchStreamWriter", "Disk quota", "Read-only file system")
    text = str(error)
    return (isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS) or any(word in text for word in words)


def _write_error(what: str, run: Path, error: Exception) -> RankError:
    shutil.rmtree(run / STAGING_FOLDER, ignore_errors=True)
    checkpoints = list_checkpoints(run)
    next_step = f"resume from {checkpoints[0]} with --resume auto" if checkpoints else "there is no checkpoint yet"
    return RankError(
        f"{what} could not be written to {run} ({str(error).splitlines()[0]}); free space there: {next_step}"
    )


def raise_if_out_of_memory(error: Exception, run: str | Path, step: int) -> None:
    """Raise a one-line error, if `error` says that this process is out of memory.

    Raises:
        RankError: this process is out of memory.
    """
    import torch

    lines = str(error).splitlines() or ["no memory is left"]
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in lines[0]:
        return
    raise RankError(
        f"step {step}: out of memory ({lines[0]}){last_checkpoint_note(run)}; lower --per_device_train_batch_size "
        "(with global_batch_size the results stay the same) or add --gradient_checkpointing true, and continue with "
        "--resume auto"
    ) from error


def last_checkpoint_note(run: str | Path) -> str:
    """Return the end of an error message that names the run's last checkpoint; empty without one."""
    checkpoints = list_checkpoints(run)
    return f"; {checkpoints[0]} is the last checkpoint" if checkpoints else ""


def _files_in(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)


def _read_checksums(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / CHECKSUMS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        expected, _, name = line.partition("  ")
        yield name, expected


def _sha256(path: Path, flush: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
        if flush:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
