"""Worker processes that take turns, each in a virtual environment with the library that it measures.

A worker does one unit of work (an update, some steps) for each line on its standard input, and prints what it measured
as a line of JSON. Workers that take turns run under the same load of the machine. So the ratio of their times is
comparable, even where the times are not."""

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
    """Return an interpreter that has a package (``trl==1.12.0``), and otherwise the versions of constraints.txt.

    Its environment is made at the first call, in benchmarks/.venvs. None: the current interpreter.
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
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for packages in (["torch"], [requirement, "peft"]):
            subprocess.run([*install, *packages], check=True, env=environment)
        (folder / ".ready").touch()
    return str(python)


class Worker:
    """A process that runs `script` and works on request. Its errors go to a log in benchmarks/results/logs."""

    def __init__(self, name: str, script: str, arguments: Sequence[str], requirement: str | None = None) -> None:
        self.name, self.log = name, HERE / "results" / "logs" / f"{name.replace(' ', '_').replace('/', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [python_with(requirement), str(HERE / script), *arguments]
        with self.log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | OFFLINE,
            )  # fmt: skip
        self._ready = False

    def wait(self) -> None:
        """Wait until the worker is ready."""
        if not self._ready:
            self._read()
            self._ready = True

    def work(self) -> dict[str, Any]:
        """Request one unit of work and return what the worker measured."""
        self.wait()
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):  # other lines are printed by libraries
                return dict(json.loads(line[1:]))
        raise SystemExit(f"worker {self.name} ended before its result; see {self.log}")

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()


def work_on_request(start: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """In a worker: report that it is ready and wait for the first request.

    `start` is called at each request. Call the returned function with the measurements after each unit of work; it waits
    for the next request.
    """

    def report(measurements: dict[str, Any]) -> None:
        print("@" + json.dumps(measurements), flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        start()

    report({})
    return report


def take_turns(workers: Sequence[Worker], rounds: int, warm_up: int = 1) -> list[list[dict[str, Any]]]:
    """Return the measurements of each worker in each round; the first `warm_up` rounds are left out."""
    results: list[list[dict[str, Any]]] = [[] for _ in workers]
    for worker in workers:  # no worker starts up while another one works
        worker.wait()
    for turn in range(warm_up + rounds):
        for index, worker in enumerate(workers):
            measurements = worker.work()
            if turn >= warm_up:
                results[index].append(measurements)
        seconds = "  ".join(
            f"{worker.name} {measured[-1]['seconds']:.2f}"
            for worker, measured in zip(workers, results, strict=True)
            if measured
        )
        print(f"  round {turn + 1}/{warm_up + rounds}: {seconds or 'warming up'}", flush=True)
    return results


def peak_mib() -> float:
    """Return this process's peak memory in MiB: the GPU's allocated memory if there is a GPU, else the resident set.

    Not `ru_maxrss`: on Linux it begins with the memory of the parent process.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac
    return largest / (2**20 if sys.platform == "darwin" else 1024)


def median_and_quartiles(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile."""
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def as_ratio(ratios: Sequence[float]) -> str:
    """Format ratios as their median and, in brackets, quartiles."""
    middle, low, high = median_and_quartiles(ratios)
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"
