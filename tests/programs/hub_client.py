"""Run stages and programs in new processes that use a local Hub.

huggingface_hub reads the Hub's address when it is imported. One process is started with the address; it forks for each job.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".out", ".err", ".waited", ".connections")
SOURCE = Path(__file__).resolve().parents[2] / "src"


@dataclass
class ProcessResult:
    """How a process ended. waited: the waits in seconds (shortened in the tests); connections: hosts it contacted."""

    code: int
    out: str
    err: str
    waited: list[float]
    connections: list[str]

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class Client:
    """A process that has imported everything, and forks for each job."""

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
        """Start a job and return its process id; call `finish` next."""
        assert self._process.stdin is not None
        self.jobs += 1
        self._process.stdin.write(json.dumps(job | {"output": str(self.home / f"job-{self.jobs}")}) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def finish(self) -> ProcessResult:
        status, output = int(self._line()), self.home / f"job-{self.jobs}"
        out, err, waited, connections = (output.with_suffix(suffix).read_text() for suffix in SUFFIXES)
        return ProcessResult(status, out, err, [float(line) for line in waited.split()], connections.splitlines())

    def stage(self, *arguments: str, token: str | None = None, **options: Any) -> ProcessResult:
        """Run `python -m rlhf_recipes` with these arguments. options: `offline`; `read_timeout`, in seconds."""
        self.start({"arguments": list(arguments), "token": token, **options})
        return self.finish()

    def program(self, text: str, token: str | None = None, **names: Any) -> ProcessResult:
        """Run Python source in which `names` are defined."""
        self.start({"program": text, "names": {name: str(value) for name, value in names.items()}, "token": token})
        return self.finish()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks has ended")
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _child(job: dict[str, Any]) -> int:
    output = Path(job["output"])
    os.environ.pop("HF_TOKEN", None)
    if job.get("token"):
        os.environ["HF_TOKEN"] = job["token"]
    waited, sleep = output.with_suffix(".waited").open("a"), time.sleep

    def log_and_shorten(seconds: float) -> None:
        if seconds >= 1:
            print(seconds, file=waited, flush=True)
        sleep(min(seconds, 0.01))

    connections = output.with_suffix(".connections").open("a")

    def log_connection(event: str, details: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(details[1], tuple):
            print(*details[1][:2], sep=":", file=connections, flush=True)
        elif event == "socket.getaddrinfo":
            print(details[0], file=connections, flush=True)

    time.sleep = log_and_shorten
    sys.addaudithook(log_connection)
    from huggingface_hub import constants

    from rlhf_recipes.hub import requests

    constants.HF_HUB_OFFLINE = bool(job.get("offline"))
    requests.READ_TIMEOUT = job.get("read_timeout", requests.READ_TIMEOUT)
    try:
        if "arguments" in job:
            from rlhf_recipes.__main__ import main

            sys.argv = ["rlhf_recipes", *job["arguments"]]
            main()
        else:
            exec(job["program"], dict(job["names"]))
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def _forked(job: dict[str, Any]) -> int:
    output = Path(job["output"])
    for name in SUFFIXES:
        output.with_suffix(name).write_text("")
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(output.with_suffix(".out"), os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(os.open(output.with_suffix(".err"), os.O_WRONLY | os.O_APPEND), 2)
    code = 1
    try:
        code = _child(job)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi  # noqa: F401
    from tqdm import tqdm
    from trl import TrlParser  # noqa: F401

    from rlhf_recipes.reports import plots

    for path in sorted((SOURCE / "rlhf_recipes" / "stages").glob("[a-z]*.py")):
        importlib.import_module(f"rlhf_recipes.stages.{path.stem}")
    # Drawing takes longer than a tiny run.
    plots.write_figure = lambda draw, path, *arguments, **options: Path(path).write_bytes(b"\x89PNG")
    torch.set_num_threads(1)
    # tqdm's default lock is shared by all forks; a killed fork could hold it for ever.
    tqdm.set_lock(threading.RLock())
    gc.collect()
    gc.freeze()  # Trainer collects garbage after each run, and would search all libraries
    for line in sys.stdin:
        child = _forked(json.loads(line))
        print(child, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)


if __name__ == "__main__":
    main()
