"""Stages and programs as processes of their own, against a Hub that is not at huggingface.co.

Its address is read as the Hub's library is imported, so all of them are children of one process that was started with it.
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".out", ".err", ".waited", ".met")
SOURCE = Path(__file__).resolve().parents[2] / "src"


@dataclass
class Said:
    """How a process ended. waited: the seconds that it meant to wait, in order (it did not); met: whom it connected to."""

    code: int
    out: str
    err: str
    waited: list[float]
    met: list[str]

    @property
    def last(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class Client:
    """One process that has everything imported, and forks for each job."""

    def __init__(self, address: str, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.jobs = home, 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, job: dict[str, Any]) -> int:
        """Begin a job; returns its process id. `finish` must follow."""
        assert self._process.stdin is not None
        self.jobs += 1
        self._process.stdin.write(json.dumps(job | {"into": str(self.home / f"job-{self.jobs}")}) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def finish(self) -> Said:
        status, into = int(self._line()), self.home / f"job-{self.jobs}"
        out, err, waited, met = (into.with_suffix(suffix).read_text() for suffix in SUFFIXES)
        return Said(status, out, err, [float(line) for line in waited.split()], met.splitlines())

    def stage(self, *words: str, token: str | None = None, **options: Any) -> Said:
        """`python -m rlhf_recipes` with these words. options: `offline`; `stalled`, in seconds."""
        self.start({"words": list(words), "token": token, **options})
        return self.finish()

    def program(self, text: str, token: str | None = None, **names: Any) -> Said:
        """Python, in which `names` are known."""
        self.start({"program": text, "names": {name: str(value) for name, value in names.items()}, "token": token})
        return self.finish()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that starts the others is gone")
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _child(job: dict[str, Any]) -> int:
    into = Path(job["into"])
    os.environ.pop("HF_TOKEN", None)
    if job.get("token"):
        os.environ["HF_TOKEN"] = job["token"]
    waited, wait = into.with_suffix(".waited").open("a"), time.sleep

    def noted(seconds: float) -> None:
        if seconds >= 1:
            print(seconds, file=waited, flush=True)
        wait(min(seconds, 0.01))

    met = into.with_suffix(".met").open("a")

    def seen(event: str, details: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(details[1], tuple):
            print(*details[1][:2], sep=":", file=met, flush=True)
        elif event == "socket.getaddrinfo":
            print(details[0], file=met, flush=True)

    time.sleep = noted
    sys.addaudithook(seen)
    from huggingface_hub import constants

    from rlhf_recipes.hub import requests as asking

    constants.HF_HUB_OFFLINE = bool(job.get("offline"))
    asking.READ_TIMEOUT = job.get("stalled", asking.READ_TIMEOUT)
    try:
        if "words" in job:
            from rlhf_recipes.__main__ import main

            sys.argv = ["rlhf_recipes", *job["words"]]
            main()
        else:
            exec(job["program"], dict(job["names"]))
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def _forked(job: dict[str, Any]) -> int:
    into = Path(job["into"])
    for name in SUFFIXES:
        into.with_suffix(name).write_text("")
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(into.with_suffix(".out"), os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(os.open(into.with_suffix(".err"), os.O_WRONLY | os.O_APPEND), 2)
    code = 1
    try:
        code = _child(job)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi  # noqa: F401
    from tqdm import tqdm
    from trl import TrlParser  # noqa: F401

    import rlhf_recipes.stages.push  # noqa: F401

    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # the usual one is shared by all forks, and one that is killed may hold it for ever
    for line in sys.stdin:
        child = _forked(json.loads(line))
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
