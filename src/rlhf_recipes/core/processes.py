"""The process's place in a distributed run, read from the environment that a launcher sets (torchrun, Accelerate)."""

import os
import sys


def rank() -> int:
    """Return the rank of this process (``RANK``); 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Return the number of processes in the run (``WORLD_SIZE``); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Return whether this process has rank 0: the one that prints and writes files."""
    return rank() == 0


def is_distributed_launch() -> bool:
    """Return whether a launcher started this process as part of a process group."""
    return "WORLD_SIZE" in os.environ


def log_line(text: str) -> None:
    """Print one line for the user on stderr, once for all processes."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)
