"""Causal attention in bfloat16 on a CPU, forward and backward: PyTorch's, and ours for short rows.

    python benchmarks/attention.py

Milliseconds are medians of rounds in turns; the ratio is what counts. It is where `SHORT` in models/kernels.py comes from.
"""

import time

import torch
from peers import as_ratio
from torch.nn.functional import scaled_dot_product_attention

from rlhf_recipes.optimizations import ShortCausalAttention
from rlhf_recipes.system import describe_hardware, keep_freed_memory_

SHAPES = [(8, 6, 48, 64), (8, 6, 96, 64), (8, 12, 128, 64), (4, 12, 192, 64), (4, 12, 256, 64), (4, 12, 384, 64)]
ROUNDS = 15


def milliseconds(shape: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Of each round: PyTorch's, and ours."""
    query, key, value = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    gradient = torch.randn(shape).bfloat16()
    kinds = (
        lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        lambda: ShortCausalAttention.apply(query, key, value, shape[-1] ** -0.5),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 2):
        for kind, taken in zip(kinds, times, strict=True):
            started = time.perf_counter()
            kind().backward(gradient)
            taken.append((time.perf_counter() - started) * 1e3)
    return times[0][2:], times[1][2:]


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory_()
    print(
        f"{describe_hardware()}\n\n| rows, heads, tokens, size | PyTorch's time over ours | ms, PyTorch | ms, ours |\n|---|---|---|---|"
    )
    for shape in SHAPES:
        theirs, ours = milliseconds(shape)
        ratios = [one / two for one, two in zip(theirs, ours, strict=True)]
        middle = [sorted(taken)[ROUNDS // 2] for taken in (theirs, ours)]
        print(f"| {shape} | {as_ratio(ratios)} | {middle[0]:.1f} | {middle[1]:.1f} |")


if __name__ == "__main__":
    main()
