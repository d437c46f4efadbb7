"""Settings for the hardware: bfloat16, memory that is kept, oneDNN's cache, threads."""

import copy
import os
import platform
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_recipes.system.hardware import choose_precision, configure_cpu_runtime_


class Training:
    """The fields of a TrainingArguments that `choose_precision` and `configure_cpu_runtime_` read."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update({"use_cpu": True, "bf16": False, "mixed_precision": "no", **fields})


@pytest.mark.parametrize(
    ("width", "unit", "by_hardware", "expected"),
    [(320, "unit", True, True), (128, "unit", True, False), (320, "", True, False), (320, "unit", False, False)],
)
def test_bf16_is_chosen_where_it_is_faster_and_not_configured(
    monkeypatch: pytest.MonkeyPatch, width: int, unit: str, by_hardware: bool, expected: bool
) -> None:
    monkeypatch.setattr(import_module("rlhf_recipes.system.hardware"), "bf16_support", lambda: unit)
    training = Training(_bf16_by_hardware=by_hardware)
    before = copy.copy(training.__dict__)
    chosen = choose_precision(training, width)  # type: ignore[type-var]
    assert chosen.bf16 is expected and chosen.mixed_precision == ("bf16" if expected else "no")
    assert training.__dict__ == before, "the caller's arguments are unchanged"
    assert choose_precision(chosen, width) is chosen, "a second call changes nothing"


def test_bf16_is_not_chosen_if_the_deepspeed_config_disables_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("rlhf_recipes.system.hardware"), "bf16_support", lambda: "unit")
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}})
    training = Training(_bf16_by_hardware=True, deepspeed_plugin=plugin)
    assert choose_precision(training, 320).bf16 is False  # type: ignore[type-var]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_keep_freed_memory_keeps_freed_pages() -> None:
    """Of 64 MiB of freed memory a new process keeps at least 60 MiB, and at most 4 MiB without the call."""
    script = (
        "import torch\n"
        "from rlhf_recipes.system.hardware import keep_freed_memory_\n"
        "pages = lambda: [int(count) for count in open('/proc/self/statm').read().split()[1:3]]\n"
        "resident_mib = lambda: (pages()[0] - pages()[1]) // 256  # without the code that torch maps from files\n"
        "for prepare in (lambda: None, keep_freed_memory_):\n"
        "    prepare(); before = resident_mib(); x = torch.ones(2**24); del x; print(resident_mib() - before)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    output = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    without_call, with_call = map(int, output.split()[-2:])
    assert with_call >= 60 and without_call <= 4


def test_onednn_cache_capacity_is_limited_unless_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    configure_cpu_runtime_(Training(), 64)  # type: ignore[arg-type]
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    configure_cpu_runtime_(Training(use_cpu=False), 64)  # type: ignore[arg-type]
    assert name not in os.environ, "a GPU does not need it"
    configure_cpu_runtime_(Training(), 64)  # type: ignore[arg-type]
    assert 0 < int(os.environ[name]) < 1024


def test_number_of_threads_is_left_alone_if_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    configure_cpu_runtime_(Training(), 64)  # type: ignore[arg-type]
    assert chosen == [], "OMP_NUM_THREADS is set in the tests"
    monkeypatch.delenv("OMP_NUM_THREADS")
    configure_cpu_runtime_(Training(), 64)  # type: ignore[arg-type]
    assert chosen == [1], "small layers run on one thread"
    training = Training()
    configure_cpu_runtime_(training, 64)  # type: ignore[arg-type]
    configure_cpu_runtime_(training, 64)  # type: ignore[arg-type]
    assert chosen == [1, 1], "threads are set once for each arguments object"
