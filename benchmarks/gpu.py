"""On one GPU, GPT-2 with 124M parameters: PPO next to TRL 1.12's, pretraining next to a plain loop, with absolute
figures.

    python benchmarks/gpu.py [--rounds 5] [--episodes 32] [--prompt 64] [--response 128]

Weights are random. Utilisation is the model's floating-point operations, counted from its shape and the real tokens,
over the fastest matrix product of this GPU in that precision; reward models compute in float32. `python
benchmarks/memory.py` measures the memory of PPO, and `benchmarks/processes.py --gpu` the other stages."""

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
COUNTED = {name.partition(",")[0]: case for name, case in growth.CASES.items()}  # by the names of ppo_speed


def matrix_rates() -> dict[bool, float]:
    """Return the operations per second of a large product, in float32 (False) and bfloat16 (True)."""
    rates = {}
    for low_precision in (False, True):
        precision = torch.bfloat16 if low_precision else torch.float32
        left, right = (torch.randn(8192, 8192, device="cuda").to(precision) for _ in "12")
        milliseconds = do_bench(lambda left=left, right=right: left @ right, return_mode="median")
        rates[low_precision] = 2 * 8192**3 / (milliseconds / 1000)
    return rates


def ppo(options: Any, rates: dict[bool, float]) -> tuple[list[str], Any]:
    """Return the lines of the PPO table, and all that was measured."""
    common = ["--shape", SHAPE, "--batch", str(options.episodes), "--prompt", str(options.prompt)]
    results = compared(options.cases, [*common, "--response", str(options.response)], options.rounds)
    theirs = results[0]["theirs"][-1]
    lines = [
        "| | episodes per second, TRL 1.12 = 1 | update, s | peak memory, MiB | generate | score | forward | update |",
        "|---|---|---|---|---|---|---|---|",
        f"| TRL 1.12 | | {theirs['seconds']:.2f} | {theirs['above_imports']:,.0f} | | | | |",
    ]
    for result in results[1:]:
        update = result["ours"][-1]
        phases = {name: update.get(f"time/{name}") for name in ("generate", "score", "forward", "update")}
        cells = ["" if seconds is None else f"{seconds:.2f} s" for seconds in phases.values()]
        if case := COUNTED.get(result["case"]):
            operations = work(case, update, SHAPE, options.episodes)
            cells = [
                f"{seconds:.2f} s, {operations[name] / seconds / rates[update['bf16'] and name != 'score']:.0%}"
                for name, seconds in phases.items()
            ]
        numbers = f"{as_ratio(result['ratios'])} | {update['seconds']:.2f} | {update['above_imports']:,.0f}"
        lines.append(f"| {result['case']} | {numbers} | {' | '.join(cells)} |")
    for update in (result["ours"][-1] for result in results if result["case"] == "defaults"):
        lines += [
            "",
            f"Defaults: {update['answers'] / update['time/generate']:,.0f} answer tokens per second are generated, "
            f"{EPOCHS * update['tokens'] / update['time/update']:,.0f} tokens per second are trained on.",
        ]
    return lines, results


def pretraining(options: Any, rates: dict[bool, float]) -> tuple[list[str], Any]:
    """Return the lines of the pretraining table, and all that was measured."""
    sizes = ["--shape", SHAPE, "--batch", str(options.blocks)]
    sides = {"plain loop, float32": ["plain"], "ours, float32": ["ours"], "ours, defaults": ["ours", "--defaults"]}
    workers = [Worker(f"gpu {name}", "pretrain_worker.py", [*flags, *sizes]) for name, flags in sides.items()]
    try:
        results = take_turns(workers, options.rounds)
    finally:
        for worker in workers:
            worker.close()
    tokens = STEPS * options.blocks * BLOCK
    operations = 3 * sum(trunk_and_head(tokens, tokens, SHAPE, STEPS * options.blocks))
    lines = [
        "| | tokens per second, plain loop = 1 | tokens per second | utilisation | peak memory, MiB |",
        "|---" * 5 + "|",
    ]
    for name, rounds in zip(sides, results, strict=True):
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(results[0], rounds, strict=True)]
        seconds = sorted(measured["seconds"] for measured in rounds)[len(rounds) // 2]
        share = operations / seconds / rates["defaults" in name]
        ratio = as_ratio(ratios) if rounds is not results[0] else ""
        memory = rounds[-1]["above_imports"]
        lines.append(f"| {name} | {ratio} | {tokens / seconds:,.0f} | {share:.0%} | {memory:,.0f} |")
    return lines, dict(zip(sides, results, strict=True))


def main() -> None:
    """Measure, print the tables, and write them with all measurements to results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cases", nargs="*", default=list(CASES), choices=list(CASES), help="all are in the GPU's memory at once"
    )
    parser.add_argument("--episodes", type=int, default=32, help="episodes of an update")
    parser.add_argument("--prompt", type=int, default=64, help="longest prompt in tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 256 tokens in a step of pretraining")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU found; on a CPU run: make bench")
    rates = matrix_rates()
    peak = f"{rates[True] / 1e12:.0f} TFLOP/s in bfloat16, {rates[False] / 1e12:.0f} in float32"
    hardware = f"{describe_hardware()}, torch {torch.__version__}"
    head = f"{datetime.date.today()}, {hardware}; its fastest matrix product: {peak}."
    titles = {
        "pretraining": f"Pretraining, {options.rounds} paired rounds of {STEPS} steps of {options.blocks} blocks of "
        f"{BLOCK} tokens:",
        "ppo": f"PPO, {options.rounds} paired updates of {TRL} and ours, {options.episodes} episodes each, prompts of 8 "
        f"to {options.prompt} tokens, {options.response} response tokens, {EPOCHS} epochs:",
    }
    text: list[str] = [head]
    results: dict[str, Any] = {"head": head, "rates": {"float32": rates[False], "bfloat16": rates[True]}}
    for name, measure in {"ppo": ppo, "pretraining": pretraining}.items():
        lines, results[name] = measure(options, rates)
        text += ["", titles[name], "", *lines]
        (RESULTS / "gpu.md").write_text("\n".join([*text, ""]), encoding="utf-8")
        (RESULTS / "gpu.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
