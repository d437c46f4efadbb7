"""Forward and backward pass of one PPO minibatch, packed (without padding) and padded, in turns.

    python benchmarks/packing.py [--rounds 15]

32 episodes with prompts of 8 to 48 tokens and answers of 48, GPT-2 14M, in float32, and in bfloat16 if this machine
has a unit for it, split into the micro-batches of the trainer. "Padded" also computes the last layer for every token;
see optimizations/packing.py."""

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
from rlhf_recipes.optimizations import fuse_kernels_, packing
from rlhf_recipes.ppo import PolicyAndValue, disable_dropout_, pad_episodes, trim_padding
from rlhf_recipes.system import bf16_support, describe_hardware, keep_freed_memory_, tokens_per_forward

CPU = torch.device("cpu")
CASES = {  # with a value model, trained upper layers (None: all)
    "same algorithm": (True, None),
    "defaults": (False, None),
    "two upper layers": (False, 2),
    "one upper layer": (False, 1),
}


def episodes() -> dict[str, torch.Tensor]:
    """Return 32 random episodes as PPO packs them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 49, (32,), generator=generator).tolist()
    ids = [torch.randint(0, 8000, (length + 48,), generator=generator).tolist() for length in lengths]
    return pad_episodes([row[:-48] for row in ids], [row[-48:] for row in ids])


def model(with_value_model: bool, upper_layers: int | None) -> PolicyAndValue:
    """Return a random policy with a value head or a value model, without dropout."""
    options = argparse.Namespace(shape="14M", prompt=48, response=48)
    policy = fuse_kernels_(model_of(GPT2LMHeadModel, options, 0), CPU)
    value_model = fuse_kernels_(model_of(GPT2ForSequenceClassification, options, 2), CPU) if with_value_model else None
    both = PolicyAndValue(policy, value_model, None, upper_layers)
    disable_dropout_(both)
    return both


@contextmanager
def padded(enabled: bool) -> Iterator[None]:
    """Within this block rows are padded instead of packed, if enabled."""
    supports_packing = packing.supports_packing
    if enabled:
        packing.supports_packing = lambda trunk: False
    try:
        yield
    finally:
        packing.supports_packing = supports_packing


def compared(both: PolicyAndValue, low_precision: bool, rounds: int) -> tuple[list[float], float]:
    """Return the ratio of each round, and the columns of all micro-batches over the tokens in them."""
    rows: dict[str, Any] = episodes()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        if both.lower is not None:
            (rows["lower_states"],) = both.lower_outputs(**rows)
    lengths = rows["attention_mask"].sum(1).tolist()
    batches = batches_by_length(lengths, len(lengths), tokens_per_forward(CPU, low_precision))
    multiple = 16 if low_precision else 1
    micro_batches = [trim_padding({name: rows[name][batch] for name in rows}, multiple) for batch in batches]
    ratios = []
    for turn in range(rounds + 2):
        seconds = []
        for with_padding in (True, False):
            started = time.perf_counter()
            for micro_batch in micro_batches:
                with padded(with_padding), torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
                    outputs = both(**micro_batch)
                (outputs.log_probs.sum() + outputs.values.sum()).backward()
            both.zero_grad()
            seconds.append(time.perf_counter() - started)
        if turn >= 2:
            ratios.append(seconds[0] / seconds[1])
    return ratios, sum(micro_batch["input_ids"].numel() for micro_batch in micro_batches) / sum(lengths)


def main() -> None:
    """Measure, print the table, and write it to results/packing.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory_()
    lines = [f"{datetime.date.today()}, {describe_hardware()}; {options.rounds} rounds in turns.", ""]
    lines += ["| | precision | time padded, packed = 1 | columns padded, tokens = 1 |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for case, (with_value_model, upper_layers) in CASES.items():
        for low_precision in (False, True) if bf16_support() else (False,):
            ratios, columns = compared(model(with_value_model, upper_layers), low_precision, options.rounds)
            precision = "bfloat16" if low_precision else "float32"
            lines.append(f"| {case} | {precision} | {as_ratio(ratios)} | {columns:.2f}x |")
            print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "packing.md"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
