"""Precision and threads for the machine at hand."""

import copy
import ctypes
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlhf_recipes.system.launch import zero_stage

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

TrainingT = TypeVar("TrainingT", bound="TrainingArguments")

# Below this width the casts of autocast cost a CPU more than its bfloat16 unit gains, or little less. Measured, one thread: Xeon
# with AMX, 128 wide 0.87x, 256 wide 1.6x, 320 wide 2.7x; EPYC with AVX512-BF16, 128 wide 1.3x, 256 wide 1.5x, 384 wide 1.6x.
BF16_WIDTH_ON_CPU = 256
BF16_MATRIX_UNIT = "bfloat16 matrix unit"
KERNELS = 64  # more than one piece of a minibatch has, forward and backward
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def tokens_per_forward(device: "torch.device", low: bool = False) -> int:
    """Tokens that keep the device busy in one pass; more of them only need more memory.

    low: computed in bfloat16, where every pass also brings the gradients of all weights back to float32. Measured with 14M
    parameters: on a Xeon with AMX float32 products have their full rate at 600 rows; an EPYC took 640 to 1280 alike.
    """
    if device.type != "cpu":
        return 2**16
    return 2048 if low else 1024


def fit_to_hardware(training: TrainingT, width: int) -> TrainingT:
    """A copy of the training arguments with bf16 decided for this machine and a model `width` hidden units wide.

    What the caller set stays. On a CPU it also sets the number of torch threads, unless OMP_NUM_THREADS says it. What was
    fitted before comes back as it is.
    """
    if training.__dict__.get("_fitted"):
        return training
    fitted = copy.copy(training)
    fitted.__dict__["_fitted"] = True
    if not training.use_cpu:
        return fitted
    # Not under DeepSpeed, which has been told its precision already.
    chosen_here = training.__dict__.get("_bf16_by_hardware") and zero_stage(training) is None
    if chosen_here and width >= BF16_WIDTH_ON_CPU and bf16_support():
        fitted.bf16, fitted.mixed_precision = True, "bf16"
    if "OMP_NUM_THREADS" not in os.environ:
        choose_thread_count_(width)
    keep_freed_memory_()
    limit_onednn_cache_()
    return fitted


def keep_freed_memory_() -> None:
    """Let this process keep the memory it frees, for its next tensor; the peak stays what it is.

    glibc gives large blocks back to the system at once, and a training step, which asks for the same ones again and
    again, then waits for the pages (measured: 10 to 20 % of a bfloat16 step). Set MALLOC_MMAP_THRESHOLD_ to choose
    otherwise; other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        library = ctypes.CDLL(None)
        for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            library.mallopt(name, 2**30)


def limit_onednn_cache_() -> None:
    """Let oneDNN keep the code of few products, if this process has asked it for none yet.

    It writes code for each shape that it multiplies in bfloat16, some 0.6 MiB, and keeps that of 1024; without padding almost
    every piece of a minibatch has a shape of its own (measured: after a hundred updates a PPO of two layers held a quarter less,
    in the same time). Set ONEDNN_PRIMITIVE_CACHE_CAPACITY to choose otherwise.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def release_freed_memory_() -> None:
    """Return to the system what this process has freed and kept (glibc; other C libraries are left alone)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def choose_thread_count_(width: int) -> int:
    """Choose the number of CPU threads by a short measurement of one layer's work; returns it.

    On a busy machine more threads wait for one another at every barrier, so the count is measured, not assumed.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1
    best = 1
    if width >= BF16_WIDTH_ON_CPU and cores > 1:  # small layers gain nothing worth the risk
        times = {count: _layer_seconds(width, count) for count in sorted({1, cores // 2 or 1, cores})}
        best = min(times, key=lambda count: times[count] * (1.0 if count == 1 else 1.15))
    torch.set_num_threads(best)
    return best


def _layer_seconds(width: int, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    rows, weight = torch.randn(1024, width), torch.randn(width, 4 * width)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        torch.nn.functional.gelu(rows @ weight) @ weight.T
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) * 3 // 4]  # a slow quartile: barriers hurt in the tail


def bf16_support() -> str:
    """What the processor multiplies bfloat16 with, faster than float32; empty where it has nothing of the kind."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return BF16_MATRIX_UNIT
    return "bfloat16 vector unit" if torch.cpu._is_avx512_bf16_supported() else ""


def describe_hardware() -> str:
    """What this process runs on, for a line beside its numbers: accelerator or processor, threads, precision unit."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores = os.cpu_count() or 1
    unit = [unit] if (unit := bf16_support()) else []
    return ", ".join([_processor(), f"{cores} cores", f"{torch.get_num_threads()} torch threads", *unit])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
