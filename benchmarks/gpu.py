"""On one GPU, GPT-2 with 124M parameters: PPO against TRL 1.12's, pretraining against a plain loop, in absolute figures too.

    python benchmarks/gpu.py [--rounds 5] [--episodes 32] [--prompt 64] [--response 128]

Random weights. Utilisation is the model's floating-point operations, counted from its shape and the real tokens, over the
fastest bfloat16 product that this GPU was seen to do, in float32 modes the fastest of float32; reward models read in float32 always.
What memory PPO takes: `python benchmarks/memory.py`. What the rest of the pipeline does there: `benchmarks/processes.py --gpu`.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import growth
import torch
from growth import EPOCHS, trunk_and_head, work
from peers import Worker, as_ratio, take_turns
from ppo_speed import CASES, TRL, compared
from pretrain_worker import BLOCK, STEPS
from triton.testing import do_bench

from rlhf_recipes.system import describe_hardware

RESULTS = Path(__file__).parent / "results"
SHAPE = "124M"
COUNTED = {name.partition(",")[0]: case for name, case in growth.CASES.items()}  # under the names that ppo_speed has


def matrix_rates() -> dict[bool, float]:
    """Of float32 (False) and bfloat16 (True): the fastest product, in operations a second."""
    rates = {}
    for low in (False, True):
        left, right = (
            torch.randn(8192, 8192, device="cuda").to(torch.bfloat16 if low else torch.float32) for _ in "12"
        )
        rates[low] = 2 * 8192**3 / (do_bench(lambda left=left, right=right: left @ right, return_mode="median") / 1000)
    return rates


def ppo(asked: Any, rates: dict[bool, float]) -> tuple[list[str], Any]:
    common = ["--shape", SHAPE, "--batch", str(asked.episodes), "--prompt", str(asked.prompt)]
    found = compared(asked.cases, [*common, "--response", str(asked.response)], asked.rounds)
    theirs = found[0]["theirs"][-1]
    lines = [
        "| | episodes per second, to TRL 1.12's | an update, s | peak memory, MiB | generate | score | forward | update |",
        "|---|---|---|---|---|---|---|---|",
        f"| TRL 1.12 | | {theirs['seconds']:.2f} | {theirs['above_imports']:,.0f} | | | | |",
    ]
    for each in found[1:]:
        said = each["ours"][-1]
        phases = {name: said.get(f"time/{name}") for name in ("generate", "score", "forward", "update")}  # ours alone
        cells = ["" if seconds is None else f"{seconds:.2f} s" for seconds in phases.values()]
        if case := COUNTED.get(each["case"]):
            done = work(case, said, SHAPE, asked.episodes)
            cells = [
                f"{seconds:.2f} s, {done[name] / seconds / rates[said['bf16'] and name != 'score']:.0%}"
                for name, seconds in phases.items()
            ]
        told = f"{as_ratio(each['ratios'])} | {said['seconds']:.2f} | {said['above_imports']:,.0f}"
        lines.append(f"| {each['case']} | {told} | {' | '.join(cells)} |")
    for said in (each["ours"][-1] for each in found if each["case"] == "defaults"):
        lines += [
            "",
            f"Defaults: {said['answers'] / said['time/generate']:,.0f} answer tokens a second are generated, "
            f"{EPOCHS * said['tokens'] / said['time/update']:,.0f} tokens a second are learnt from.",
        ]
    return lines, found


def pretraining(asked: Any, rates: dict[bool, float]) -> tuple[list[str], Any]:
    sizes = ["--shape", SHAPE, "--batch", str(asked.blocks)]
    sides = {"plain loop, float32": ["plain"], "ours, float32": ["ours"], "ours, defaults": ["ours", "--defaults"]}
    workers = [Worker(f"gpu {name}", "pretrain_worker.py", [*words, *sizes]) for name, words in sides.items()]
    try:
        found = take_turns(workers, asked.rounds)
    finally:
        for worker in workers:
            worker.close()
    tokens = STEPS * asked.blocks * BLOCK
    operations = 3 * sum(trunk_and_head(tokens, tokens, SHAPE, STEPS * asked.blocks))
    lines = [
        "| | tokens per second, to the plain loop's | tokens per second | of the rate | peak memory, MiB |",
        "|---" * 5 + "|",
    ]
    for name, mine in zip(sides, found, strict=True):
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(found[0], mine, strict=True)]
        seconds = sorted(each["seconds"] for each in mine)[len(mine) // 2]
        share = operations / seconds / rates["defaults" in name]
        told = as_ratio(ratios) if mine is not found[0] else ""
        lines.append(f"| {name} | {told} | {tokens / seconds:,.0f} | {share:.0%} | {mine[-1]['above_imports']:,.0f} |")
    return lines, dict(zip(sides, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), help="all are held at once")
    parser.add_argument("--episodes", type=int, default=32, help="of an update")
    parser.add_argument("--prompt", type=int, default=64, help="longest prompt in tokens")
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 256 tokens in a step of pretraining")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; on a CPU: make bench")
    rates = matrix_rates()
    said = f"{rates[True] / 1e12:.0f} TFLOP/s in bfloat16, {rates[False] / 1e12:.0f} in float32"
    head = f"{datetime.date.today()}, {describe_hardware()}, torch {torch.__version__}; its fastest matrix product: {said}."
    titles = {
        "pretraining": f"Pretraining, {asked.rounds} paired rounds of {STEPS} steps of {asked.blocks} blocks of {BLOCK} tokens:",
        "ppo": f"PPO, {asked.rounds} paired updates of {TRL} and ours, {asked.episodes} episodes each, prompts of 8 to "
        f"{asked.prompt} tokens, {asked.response} response tokens, {EPOCHS} epochs:",
    }
    told: list[str] = [head]
    kept: dict[str, Any] = {"head": head, "rates": {"float32": rates[False], "bfloat16": rates[True]}}
    for name, measure in {"ppo": ppo, "pretraining": pretraining}.items():
        lines, kept[name] = measure(asked, rates)
        told += ["", titles[name], "", *lines]
        (RESULTS / "gpu.md").write_text("\n".join([*told, ""]), encoding="utf-8")
        (RESULTS / "gpu.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    print("\n".join(told))


if __name__ == "__main__":
    main()
