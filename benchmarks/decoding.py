"""Time of sampling on a CPU with and without each of its optimizations, in turns.

    python benchmarks/decoding.py [--rounds 9]

32 prompts of 8 to 48 tokens with answers of 48 tokens, GPT-2 14M, in float32, and in bfloat16 if this machine has a
unit for it. Left out in turn: prepacked weights (optimizations/prepacking.py), and the precision of keys and values
that is faster for a single query on this processor (optimizations/kv_cache.py)."""

import argparse
import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peers import as_ratio
from ppo_worker import model_of, prompts_of
from transformers import GPT2LMHeadModel

from rlhf_recipes.generation import sampling
from rlhf_recipes.optimizations import cached_casts, fuse_kernels_, preallocated_cache
from rlhf_recipes.system import bf16_support, describe_hardware, keep_freed_memory_

CPU = torch.device("cpu")
OPTIONS = argparse.Namespace(shape="14M", prompt=48, response=48)


def other_cache(config: Any) -> Any:
    """Return a cache whose keys and values have the precision that is not chosen on this processor."""
    cache = preallocated_cache(config)
    for layer in cache.layers:
        layer.widened = not layer.widened
    return cache


@contextmanager
def without(left_out: str) -> Iterator[None]:
    """Within this block sampling runs without "weights" (prepacked), "keys" (the chosen precision), or "both"."""
    plain_weights = mock.patch.multiple(sampling, prepacked_weights=lambda model: nullcontext())
    other_precision = mock.patch.multiple(sampling, preallocated_cache=other_cache)
    with (
        plain_weights if left_out in ("weights", "both") else nullcontext(),
        other_precision if left_out in ("keys", "both") else nullcontext(),
    ):
        yield


def compared(work: Callable[[], Any], cases: list[str], rounds: int) -> dict[str, list[float]]:
    """Return for each case and round the time without the optimization over the time with it."""
    ratios: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 2):
        seconds = {}
        for case in ("", *cases):
            with without(case):
                started = time.perf_counter()
                work()
                seconds[case] = time.perf_counter() - started
        for case in cases if turn >= 2 else ():
            ratios[case].append(seconds[case] / seconds[""])
    return ratios


def main() -> None:
    """Measure, print the table, and write it to results/decoding.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory_()
    prompts = prompts_of(OPTIONS)["input_ids"][:32]
    policy = fuse_kernels_(model_of(GPT2LMHeadModel, OPTIONS, 0), CPU)
    settings = sampling.Sampling(48, stop_ids=(-1,))

    def answer(low_precision: bool) -> None:
        with cached_casts(policy), torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            sampling.sample(policy, prompts, settings, list(range(32)))

    lines = [f"{datetime.date.today()}, {describe_hardware()}; {options.rounds} rounds in turns.", ""]
    lines += ["| precision | left out | time without it, with it = 1 |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    keys = "float32" if preallocated_cache(policy.config).layers[0].widened else "bfloat16"
    names = {"weights": "prepacked weights", "keys": f"keys in {keys}", "both": "both"}
    for low_precision in (False, True) if bf16_support() else (False,):
        cases = ["weights", "keys", "both"] if low_precision else ["weights"]
        for case, ratios in compared(partial(answer, low_precision), cases, options.rounds).items():
            lines.append(f"| {'bfloat16' if low_precision else 'float32'} | {names[case]} | {as_ratio(ratios)} |")
            print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "decoding.md"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
