"""Tokens per second of pretraining: the pretrain stage's trainer against a plain PyTorch loop, eight steps each in turns.

    python benchmarks/pretrain_speed.py [--shape 124M] [--rounds 7]

Same random GPT-2, same packed blocks of 256 tokens, 8 a step, AdamW, one thread. "same settings" is float32 on both sides;
"defaults" is what the stage does by itself on this machine.
"""

import argparse
import datetime
import json
from pathlib import Path

from peers import Worker, as_ratio, spread, take_turns

CASES = {"same settings": ([], 0.95), "defaults": (["--defaults"], 1.3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="14M")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    import torch

    from rlhf_recipes.system import describe_hardware

    torch.set_num_threads(1)

    lines = ["| ours | tokens per second, to the plain loop's | peak memory | target | |", "|---|---|---|---|---|"]
    found = []
    for case, (flags, target) in CASES.items():
        print(case, flush=True)
        workers = [
            Worker("plain loop", "pretrain_worker.py", ["plain", "--shape", asked.shape]),
            Worker(f"pretrain, {case}", "pretrain_worker.py", ["ours", "--shape", asked.shape, *flags]),
        ]
        try:
            theirs, ours = take_turns(workers, asked.rounds)
        finally:
            for worker in workers:
                worker.close()
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(theirs, ours, strict=True)]
        memory = ours[-1]["above_imports"] / theirs[-1]["above_imports"]
        met = "met" if spread(ratios)[0] >= target else "missed"
        lines.append(f"| {case} | {as_ratio(ratios)} | {memory:.2f}x | >= {target}x | {met} |")
        print(lines[-1], flush=True)
        found.append({"case": case, "ratios": ratios, "memory": memory, "theirs": theirs, "ours": ours})
    head = f"{datetime.date.today()}, {describe_hardware()}; GPT-2 {asked.shape}, {asked.rounds} paired rounds of 8 steps."
    name = Path(__file__).parent / "results" / f"pretrain_speed_{asked.shape}"
    name.with_suffix(".md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")
    name.with_suffix(".json").write_text(json.dumps({"head": head, "found": found}, indent=1), encoding="utf-8")
    print("\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
