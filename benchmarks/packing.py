"""Forward and backward of one minibatch of PPO: rows of unequal length as one without padding, and with padding, in turns.

    python benchmarks/packing.py [--rounds 15]

32 episodes of 8 to 48 prompt tokens and 48 answered ones, GPT-2 14M, in float32, and in bfloat16 where this machine has a
unit for it, in the pieces that the trainer takes. "With padding" also takes the whole last layer; see models/packed.py.
"""

import argparse
import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peers import as_ratio
from ppo_worker import model_of
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from rlhf_recipes.core.tensors import batches_by_length
from rlhf_recipes.optimizations import fuse_kernels_
from rlhf_recipes.optimizations import packing as packed
from rlhf_recipes.ppo import PolicyAndValue, disable_dropout_, pack_episodes, trim_padding
from rlhf_recipes.system import bf16_support, describe_hardware, keep_freed_memory_, tokens_per_forward

CPU = torch.device("cpu")
CASES = {  # value model, layers that learn
    "same algorithm": (True, None),
    "defaults": (False, None),
    "two upper layers": (False, 2),
    "one upper layer": (False, 1),
}


def episodes() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 49, (32,), generator=draw).tolist()
    ids = [torch.randint(0, 8000, (length + 48,), generator=draw).tolist() for length in lengths]
    return pack_episodes([row[:-48] for row in ids], [row[-48:] for row in ids])


def model(value: bool, upper: int | None) -> PolicyAndValue:
    asked = argparse.Namespace(shape="14M", prompt=48, response=48)
    policy = fuse_kernels_(model_of(GPT2LMHeadModel, asked, 0), CPU)
    values = fuse_kernels_(model_of(GPT2ForSequenceClassification, asked, 2), CPU) if value else None
    both = PolicyAndValue(policy, values, None, upper)
    disable_dropout_(both)
    return both


@contextmanager
def padding(on: bool) -> Iterator[None]:
    packs = packed.supports_packing
    if on:
        packed.supports_packing = lambda trunk: False
    try:
        yield
    finally:
        packed.supports_packing = packs


def compared(both: PolicyAndValue, low: bool, rounds: int) -> tuple[list[float], float]:
    """The ratio of each round, and the columns of all pieces over the tokens in them."""
    rows: dict[str, Any] = episodes()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        if both.lower is not None:
            (rows["lower_states"],) = both.read_lower(**rows)
    lengths = rows["attention_mask"].sum(1).tolist()
    batches = batches_by_length(lengths, len(lengths), tokens_per_forward(CPU, low))
    pieces = [trim_padding({name: each[batch] for name, each in rows.items()}, 16 if low else 1) for batch in batches]
    ratios = []
    for turn in range(rounds + 2):
        seconds = []
        for padded in (True, False):
            started = time.perf_counter()
            for piece in pieces:
                with padding(padded), torch.autocast("cpu", torch.bfloat16, enabled=low):
                    outputs = both(**piece)
                (outputs.log_probs.sum() + outputs.values.sum()).backward()
            both.zero_grad()
            seconds.append(time.perf_counter() - started)
        if turn >= 2:
            ratios.append(seconds[0] / seconds[1])
    return ratios, sum(piece["input_ids"].numel() for piece in pieces) / sum(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory_()
    lines = [f"{datetime.date.today()}, {describe_hardware()}; {asked.rounds} rounds in turns.", ""]
    lines += [
        "| | precision | time with padding over time without | columns with padding over tokens |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for case, (value, upper) in CASES.items():
        for low in (False, True) if bf16_support() else (False,):
            ratios, columns = compared(model(value, upper), low, asked.rounds)
            lines.append(f"| {case} | {'bfloat16' if low else 'float32'} | {as_ratio(ratios)} | {columns:.2f}x |")
            print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "packing.md"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
