"""Runs in forks of this process, which end as a user's process does but save its five seconds of imports."""

import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300.0  # seconds that forks may take
GRACE = 30.0  # seconds between SIGTERM and SIGKILL, as torchrun waits for the processes beside one that failed
Result = subprocess.CompletedProcess[str]


def fork() -> int:
    """Fork, with a new lock for the child's progress bars.

    All forks of a process share tqdm's lock, and a process that is killed while it holds the lock would block the others. A
    subclass of tqdm may have its own.
    """
    tqdm.get_lock()
    child = os.fork()
    if child == 0:
        lock, bars = threading.RLock(), [tqdm]
        while bars:
            bar = bars.pop()
            bar.set_lock(lock)
            bars += bar.__subclasses__()
    return child


@contextmanager
def kill_on_error(*children: int) -> Iterator[None]:
    """Within this block an error of the parent, such as the timeout of its test, kills the children as well."""
    try:
        yield
    except BaseException:
        for child in children:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        raise


def was_killed(run: Callable[[], Any], seconds: float | None = None) -> bool:
    """Run in a fork, which is killed after so many seconds unless it has ended; return whether it was, or killed itself.

    Raises:
        SystemExit: the run failed.
    """
    child = fork()
    if child == 0:
        code = 1
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds if seconds is not None else None
    with kill_on_error(child):
        while deadline is not None and time.monotonic() <= deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.002)
        else:
            if deadline is not None:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run ended with {code}")
    return code != 0


def run_recipe(name: str, words: Sequence[object], folder: Path = ROOT, **environment: str) -> Result:
    """`python recipes/NAME.py WORDS` in that folder. What only a new interpreter shows is in test_house.py."""
    recipe = str(ROOT / "recipes" / f"{name}.py")

    def run() -> None:
        os.chdir(folder)
        sys.argv[:] = [recipe, *map(str, words)]
        sys.path.insert(0, str(ROOT / "recipes"))
        runpy.run_path(recipe, run_name="__main__")

    return run_forked(run, environment)


def run_forked(run: Callable[[], Any], environment: Mapping[str, str] | None = None) -> Result:
    """Run in one fork, which ends as a process does: with what it printed and its exit code, minus the signal that killed it."""
    return _finish([run], [dict(environment or {})])


def launch(processes: int, run: Callable[[], Any], environment: Mapping[str, str] | None = None) -> Result:
    """Run in each of several forks, which torchrun's variables join to one run. If one fails, the others are ended."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(environment or {}) | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "forks", "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _finish([run] * processes, ranks)


def _finish(runs: Sequence[Callable[[], Any]], environments: Sequence[dict[str, str]]) -> Result:
    """Start all runs and wait for them; return the exit code of the first that failed, and the outputs one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for number, (run, environment) in enumerate(zip(runs, environments, strict=True)):
            for kind in ("out", "err"):  # a child that is stopped at once has written none
                (folder / f"{number}.{kind}").touch()
            child = fork()
            if child == 0:
                _end_as_process(run, environment, folder / str(number))
            children.append(child)
        with kill_on_error(*children):
            code = _wait(children, time.monotonic() + TIMEOUT)
        out, err = ("".join((folder / f"{n}.{kind}").read_text() for n in range(len(runs))) for kind in ("out", "err"))
    return Result([], code, out, err)


def _wait(children: Sequence[int], deadline: float) -> int:
    """Wait for all; once one fails, the others get SIGTERM and, after a while, SIGKILL. Returns the first failure's code."""
    running, code = set(children), 0
    while running:
        for child in sorted(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            running.remove(child)
            if code == 0 and (code := os.waitstatus_to_exitcode(status)):
                deadline = min(deadline, time.monotonic() + GRACE)
                for other in running:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            if code == 0:
                raise TimeoutError(f"{len(running)} of {len(children)} processes are still running")
            for other in running:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.005)
    return code


def _end_as_process(run: Callable[[], Any], environment: Mapping[str, str], output: Path) -> None:
    """Run without what this process has of pytest and of earlier runs, and leave the fork."""
    code = 1
    try:
        for number, ending in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(output.with_suffix(ending), os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        logging.getLogger().handlers.clear()  # pytest's, so that warnings are printed as for a user
        warnings.resetwarnings()  # ours are errors in tests
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        os.environ.update(environment)
        torch.set_num_threads(1)
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
