"""Forward and backward pass of causal attention in bfloat16 on a CPU: PyTorch's, and ours for short rows.

    python benchmarks/attention.py

The two take turns; the table shows the ratios of their times and the median of each in milliseconds. `SHORT_ROW` in
src/rlhf_recipes/optimizations/attention.py was chosen from this table.
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
    """Return the times of each round: PyTorch's and ours."""
    query, key, value = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    grad = torch.randn(shape).bfloat16()
    forms = (
        lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        lambda: ShortCausalAttention.apply(query, key, value, shape[-1] ** -0.5),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 2):
        for attend, measured in zip(forms, times, strict=True):
            started = time.perf_counter()
            attend().backward(grad)
            measured.append((time.perf_counter() - started) * 1e3)
    return times[0][2:], times[1][2:]


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    keep_freed_memory_()
    print(f"{describe_hardware()}\n")
    print("| rows, heads, tokens, head size | PyTorch's time, ours = 1 | PyTorch, ms | ours, ms |\n|---|---|---|---|")
    for shape in SHAPES:
        theirs, ours = milliseconds(shape)
        ratios = [one / two for one, two in zip(theirs, ours, strict=True)]
        medians = [sorted(times)[ROUNDS // 2] for times in (theirs, ours)]
        print(f"| {shape} | {as_ratio(ratios)} | {medians[0]:.1f} | {medians[1]:.1f} |")


if __name__ == "__main__":
    main()
