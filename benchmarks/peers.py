"""Peers, each in a virtual environment of its own, and runs that take turns.

A worker is a process that does one unit of work (an update, some steps) whenever it is told to, and says in a line of JSON
what that took. Two workers that take turns see the same weather on the machine, so their ratio means something where
their seconds do not.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENTS = HERE / ".venvs"
CONSTRAINTS = HERE.parent / "constraints.txt"
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
}  # fmt: skip


def python_with(requirement: str | None) -> str:
    """An interpreter with that package (``trl==1.12.0``), and for the rest with what the tests were run with.

    None: the interpreter at hand. An environment is made once, below benchmarks/.venvs, and kept.
    """
    if requirement is None:
        return sys.executable
    folder = ENVIRONMENTS / requirement.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / ".ready").is_file():
        print(f"making an environment with {requirement} (once, some minutes) ...", flush=True)
        package = requirement.partition("==")[0]
        pins = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith(f"{package}==")]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        (folder / "pins.txt").write_text("\n".join(pins))
        install = [str(python), "-m", "pip", "install", "-qq", "-c", str(folder / "pins.txt")]
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for what in (["torch"], [requirement, "peft"]):
            subprocess.run([*install, *what], check=True, env=alone)
        (folder / ".ready").touch()
    return str(python)


class Worker:
    """A process of `script` that works when told to."""

    def __init__(self, name: str, script: str, words: Sequence[str], requirement: str | None = None) -> None:
        self.name, self.log = name, HERE / "results" / "logs" / f"{name.replace(' ', '_').replace('/', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [python_with(requirement), str(HERE / script), *words]
        with self.log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | OFFLINE,
            )  # fmt: skip
        self._ready = False

    def wait(self) -> None:
        """Until it has said that it is ready."""
        if not self._ready:
            self._read()
            self._ready = True

    def work(self) -> dict[str, Any]:
        """One unit of work; what it took."""
        self.wait()
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):  # whatever else is printed is not for us
                return dict(json.loads(line[1:]))
        raise SystemExit(f"{self.name} ended by itself; see {self.log}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def answer_when_told(start: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """In a worker: says that it is ready and waits. Returns what to call after each unit, with what it took."""

    def told(found: dict[str, Any]) -> None:
        print("@" + json.dumps(found), flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        start()

    told({})
    return told


def take_turns(workers: Sequence[Worker], rounds: int, warm_up: int = 1) -> list[list[dict[str, Any]]]:
    """What each worker said in each round, the first rounds left out."""
    found: list[list[dict[str, Any]]] = [[] for _ in workers]
    for worker in workers:  # nobody starts up while another works
        worker.wait()
    for turn in range(warm_up + rounds):
        for place, worker in enumerate(workers):
            said = worker.work()
            if turn >= warm_up:
                found[place].append(said)
        seconds = "  ".join(
            f"{worker.name} {each[-1]['seconds']:.2f}" for worker, each in zip(workers, found, strict=True) if each
        )
        print(f"  round {turn + 1}/{warm_up + rounds}: {seconds or 'warming up'}", flush=True)
    return found


def peak() -> float:
    """MiB: the most that this process has held since it began; of the GPU's memory, if there is one.

    Not `ru_maxrss`, which on Linux is at least what the process that started this one had held by then.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac
    return held / (2**20 if sys.platform == "darwin" else 1024)


def spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the quartiles beside it."""
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def as_ratio(ratios: Sequence[float]) -> str:
    middle, low, high = spread(ratios)
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"
