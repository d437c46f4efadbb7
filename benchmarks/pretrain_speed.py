"""Tokens per second of pretraining: the pretrain stage's trainer and a plain PyTorch loop, eight steps each in turns.

    python benchmarks/pretrain_speed.py [--shape 124M] [--rounds 7]

Both train the same random GPT-2 on the same packed blocks of 256 tokens, 8 a step, with AdamW and one thread. "same
settings" is float32 on both sides; "defaults" is what the stage chooses on this machine."""

import argparse
import datetime
import json
from pathlib import Path

from peers import Worker, as_ratio, median_and_quartiles, take_turns

CASES = {"same settings": ([], 0.95), "defaults": (["--defaults"], 1.3)}  # flags; target: least speed


def main() -> None:
    """Measure, print the table, and write it with all measurements to results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="14M")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    import torch

    from rlhf_recipes.system import describe_hardware

    torch.set_num_threads(1)

    lines = ["| ours | tokens per second, plain loop = 1 | peak memory, plain loop = 1 | target | |"]
    lines.append("|---|---|---|---|---|")
    results = []
    for case, (flags, target) in CASES.items():
        print(case, flush=True)
        workers = [
            Worker("plain loop", "pretrain_worker.py", ["plain", "--shape", options.shape]),
            Worker(f"pretrain, {case}", "pretrain_worker.py", ["ours", "--shape", options.shape, *flags]),
        ]
        try:
            theirs, ours = take_turns(workers, options.rounds)
        finally:
            for worker in workers:
                worker.close()
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(theirs, ours, strict=True)]
        memory = ours[-1]["above_imports"] / theirs[-1]["above_imports"]
        met = "met" if median_and_quartiles(ratios)[0] >= target else "missed"
        lines.append(f"| {case} | {as_ratio(ratios)} | {memory:.2f}x | >= {target}x | {met} |")
        print(lines[-1], flush=True)
        results.append({"case": case, "ratios": ratios, "memory": memory, "theirs": theirs, "ours": ours})
    rounds = f"{options.rounds} paired rounds of 8 steps"
    head = f"{datetime.date.today()}, {describe_hardware()}; GPT-2 {options.shape}, {rounds}."
    name = Path(__file__).parent / "results" / f"pretrain_speed_{options.shape}"
    name.with_suffix(".md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")
    name.with_suffix(".json").write_text(json.dumps({"head": head, "found": results}, indent=1), encoding="utf-8")
    print("\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
