"""Precision, threads and memory settings that suit the machine."""

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

# Below this hidden size, autocast costs a CPU more than its bfloat16 unit gains, or little less.
# Speed relative to float32 on one thread, by hidden size:
#   Xeon with AMX            128: 0.87x   256: 1.6x   320: 2.7x
#   EPYC with AVX512-BF16    128: 1.3x    256: 1.5x   384: 1.6x
MIN_BF16_HIDDEN_SIZE = 256
BF16_MATRIX_UNIT = "bfloat16 matrix unit"
ONEDNN_CACHED_KERNELS = 64  # more than forward and backward of one minibatch shape need
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h


def tokens_per_forward(device: "torch.device", low_precision: bool = False) -> int:
    """Return how many tokens keep the device busy in one forward pass; more only need more memory.

    Args:
        device: where the model runs.
        low_precision: the model computes in bfloat16. Each pass then also casts the gradients of all weights back to
            float32, so larger passes pay off.

    Measured with 14M parameters: a Xeon with AMX reaches its full float32 rate at 600 rows; an EPYC is equally fast
    from 640 to 1280 rows.
    """
    if device.type != "cpu":
        return 2**16
    return 2048 if low_precision else 1024


def choose_precision(training: TrainingT, hidden_size: int) -> TrainingT:
    """Return a copy of the training arguments with `bf16` decided for this machine and the model's hidden size.

    A `bf16` that the caller set is kept, and so is the precision of a DeepSpeed configuration. Arguments that this
    function returned come back as they are.
    """
    if training.__dict__.get("_precision_chosen"):
        return training
    chosen = copy.copy(training)
    chosen.__dict__["_precision_chosen"] = True
    undecided = training.__dict__.get("_bf16_by_hardware") and zero_stage(training) is None
    if training.use_cpu and undecided and hidden_size >= MIN_BF16_HIDDEN_SIZE and bf16_support():
        chosen.bf16, chosen.mixed_precision = True, "bf16"
    return chosen


def configure_cpu_runtime_(training: "TrainingArguments", hidden_size: int) -> None:
    """Set torch's thread count, malloc's thresholds and oneDNN's cache size in this process, for training on a CPU.

    It does nothing where the training uses an accelerator, and nothing on a second call with the same arguments, which
    it marks. The environment variables OMP_NUM_THREADS, MALLOC_MMAP_THRESHOLD_ and ONEDNN_PRIMITIVE_CACHE_CAPACITY
    override what it would set.
    """
    if not training.use_cpu or training.__dict__.get("_runtime_configured"):
        return
    training.__dict__["_runtime_configured"] = True
    if "OMP_NUM_THREADS" not in os.environ:
        choose_thread_count_(hidden_size)
    keep_freed_memory_()
    limit_onednn_cache_()


def inference_device(use_cpu: bool) -> "torch.device":
    """Return the accelerator, or the CPU where there is none or `use_cpu` asks for it."""
    import torch

    found = None if use_cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


def configure_cpu_inference_(device: "torch.device", hidden_size: int) -> None:
    """Set torch's thread count and malloc's thresholds in this process, to run a model `hidden_size` units wide on a CPU.

    It does nothing on an accelerator; environment variables override it as in `configure_cpu_runtime_`.
    """
    if device.type != "cpu":
        return
    if "OMP_NUM_THREADS" not in os.environ:
        choose_thread_count_(hidden_size)
    keep_freed_memory_()


def keep_freed_memory_() -> None:
    """Set glibc's malloc to keep freed memory for the next tensor; the peak does not change.

    By default glibc returns large blocks to the system at once. A training step requests the same blocks again and
    again, and then waits for their pages (measured: 10 to 20 % of a bfloat16 step). If MALLOC_MMAP_THRESHOLD_ is set,
    or with another C library, it does nothing.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        library = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            library.mallopt(parameter, 2**30)


def limit_onednn_cache_() -> None:
    """Set ONEDNN_PRIMITIVE_CACHE_CAPACITY to a small number, unless it is set; oneDNN reads it at its first product.

    oneDNN compiles a kernel of about 0.6 MiB for each shape that it multiplies in bfloat16, and caches 1024 of them.
    Without padding almost every piece of a minibatch has a new shape. Measured after a hundred PPO updates of a
    two-layer model: a quarter less memory, equal speed.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_CACHED_KERNELS))


def release_freed_memory_() -> None:
    """Return memory that this process has freed to the system (glibc only; with another C library, do nothing)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def choose_thread_count_(hidden_size: int) -> int:
    """Set torch's number of CPU threads to the fastest in a short benchmark of one layer; return the number.

    The number is measured because on a busy machine threads wait for one another at every barrier.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1
    best = 1
    if hidden_size >= MIN_BF16_HIDDEN_SIZE and cores > 1:  # small layers gain too little
        seconds = {count: _layer_seconds(hidden_size, count) for count in sorted({1, cores // 2 or 1, cores})}
        best = min(seconds, key=lambda count: seconds[count] * (1.0 if count == 1 else 1.15))
    torch.set_num_threads(best)
    return best


def _layer_seconds(hidden_size: int, threads: int) -> float:
    """Return the third quartile of the seconds that one MLP layer takes on this number of threads."""
    import torch

    torch.set_num_threads(threads)
    rows, weight = torch.randn(1024, hidden_size), torch.randn(hidden_size, 4 * hidden_size)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        torch.nn.functional.gelu(rows @ weight) @ weight.T
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) * 3 // 4]  # not the median: barriers cost most in the tail


def bf16_support() -> str:
    """Return the name of the CPU's bfloat16 unit that is faster than float32; empty if it has none."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return BF16_MATRIX_UNIT
    return "bfloat16 vector unit" if torch.cpu._is_avx512_bf16_supported() else ""


def describe_hardware() -> str:
    """Return one line that describes the hardware: accelerators, or processor, cores, threads and bfloat16 unit."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores = os.cpu_count() or 1
    unit = [unit] if (unit := bf16_support()) else []
    return ", ".join([_processor_name(), f"{cores} cores", f"{torch.get_num_threads()} torch threads", *unit])


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
