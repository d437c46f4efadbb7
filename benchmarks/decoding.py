"""Sampling as it is, and without what makes it quicker on a CPU, in turns.

    python benchmarks/decoding.py [--rounds 9]

32 prompts of 8 to 48 tokens answered with 48, GPT-2 14M, in float32, and in bfloat16 where this machine has a unit for it.
Left out by turns: weights laid out once (models/prepacked.py), and keys and values kept in the precision that is quicker for
one query on this processor (models/cache.py).
"""

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

from rlhf_recipes import generation
from rlhf_recipes.optimizations import cached_casts, fuse_kernels_, preallocated_cache
from rlhf_recipes.system import bf16_support, describe_hardware, keep_freed_memory_

CPU = torch.device("cpu")
ASKED = argparse.Namespace(shape="14M", prompt=48, response=48)


def other_cache(config: Any) -> Any:
    """With keys and values in the other precision than it was thought to be quicker here."""
    cache = preallocated_cache(config)
    for layer in cache.layers:
        layer.widened = not layer.widened
    return cache


@contextmanager
def without(what: str) -> Iterator[None]:
    nothing = mock.patch.multiple(generation, prepacked_weights=lambda model: nullcontext())
    other = mock.patch.multiple(generation, preallocated_cache=other_cache)
    with (
        nothing if what in ("weights", "both") else nullcontext(),
        other if what in ("keys", "both") else nullcontext(),
    ):
        yield


def compared(work: Callable[[], Any], kinds: list[str], rounds: int) -> dict[str, list[float]]:
    """Of each kind and round: the time without it over the time as it is."""
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 2):
        seconds = {}
        for kind in ("", *kinds):
            with without(kind):
                started = time.perf_counter()
                work()
                seconds[kind] = time.perf_counter() - started
        for kind in kinds if turn >= 2 else ():
            ratios[kind].append(seconds[kind] / seconds[""])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory_()
    prompts = prompts_of(ASKED)["input_ids"][:32]
    policy = fuse_kernels_(model_of(GPT2LMHeadModel, ASKED, 0), CPU)
    sampling = generation.Sampling(48, stop_ids=(-1,))

    def answer(low: bool) -> None:
        with cached_casts(policy), torch.autocast("cpu", torch.bfloat16, enabled=low):
            generation.sample(policy, prompts, sampling, list(range(32)))

    lines = [f"{datetime.date.today()}, {describe_hardware()}; {asked.rounds} rounds in turns.", ""]
    lines += ["| precision | left out | time without it over time with it |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    kept = "float32" if preallocated_cache(policy.config).layers[0].widened else "bfloat16"
    names = {"weights": "weights laid out once", "keys": f"keys in {kept}", "both": "both"}
    for low in (False, True) if bf16_support() else (False,):
        kinds = ["weights", "keys", "both"] if low else ["weights"]
        for kind, ratios in compared(partial(answer, low), kinds, asked.rounds).items():
            lines.append(f"| {'bfloat16' if low else 'float32'} | {names[kind]} | {as_ratio(ratios)} |")
            print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "decoding.md"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
