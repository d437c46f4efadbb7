"""Episodes per second and peak memory of our PPOTrainer and of TRL 1.12's, measured update by update in turns.

    python benchmarks/ppo_speed.py [--shape 124M] [--rounds 5] [--cases "same algorithm" defaults]

Every case is a process, and so is TRL's trainer. They take turns of one update, on the same random GPT-2, with prompts
of 8 to 48 tokens (the same pool, shuffled by each trainer) and answers of 48 tokens without a stop token. The table
shows the median and quartiles of the ratios of each round. Memory is the peak resident set minus that of the imports.
TRL 1.12 computes in float32 whatever its `bf16` is; its row with autocast runs as under `accelerate launch
--mixed_precision bf16`."""

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from peers import Worker, as_ratio, median_and_quartiles, take_turns

RESULTS = Path(__file__).parent / "results"
TRL = "trl==1.12.0"
PEERS = {"TRL 1.12": ["--bf16", "false"], "TRL 1.12, autocast": ["--bf16", "true"]}
CASES: dict[str, tuple[list[str], float, float]] = {  # flags; targets: least speed and most memory, relative to TRL
    "same algorithm": (["--value", "model", "--bf16", "false"], 1.5, 0.7),
    "defaults": (["--value", "head", "--bf16", "unset"], 3.0, 0.5),
    "LoRA, value adapter": (["--value", "adapter", "--bf16", "unset", "--lora"], 8.0, 0.3),
    "LoRA, value head": (["--value", "head", "--bf16", "unset", "--lora"], 8.0, 0.3),
    "two upper layers": (["--value", "head", "--bf16", "unset", "--unfrozen", "2"], 8.0, 0.3),
    "one upper layer": (["--value", "head", "--bf16", "unset", "--unfrozen", "1"], 8.0, 0.3),
    "two upper layers, LoRA": (["--value", "adapter", "--bf16", "unset", "--lora", "--unfrozen", "2"], 8.0, 0.3),
}


def compared(
    cases: list[str], common: list[str], rounds: int, peers: Sequence[str] = ("TRL 1.12",)
) -> list[dict[str, object]]:
    """Measure all cases and peers, an update of each in every round; ratios are relative to the first peer."""
    workers: list[Worker] = []
    try:
        for peer in peers:
            workers.append(Worker(peer, "ppo_worker.py", ["theirs", *common, *PEERS[peer]], TRL))
        for case in cases:
            workers.append(Worker(case, "ppo_worker.py", ["ours", *common, *CASES[case][0]]))
        theirs, *others = take_turns(workers, rounds, warm_up=2)
    finally:
        for worker in workers:
            worker.close()
    results: list[dict[str, object]] = []
    for case, ours in zip([*peers[1:], *cases], others, strict=True):
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(theirs, ours, strict=True)]
        memory = ours[-1]["above_imports"] / theirs[-1]["above_imports"]
        targets = CASES[case][1:] if case in CASES else None
        results.append({"case": case, "ratios": ratios, "memory": memory, "targets": targets, "ours": ours})
    return [{"case": "TRL 1.12", "theirs": theirs}, *results]


def line_of(result: dict[str, object]) -> str:
    """Return the table row of a case."""
    ratios, memory = result["ratios"], float(result["memory"])  # type: ignore[arg-type]
    cells = f"| {result['case']} | {as_ratio(ratios)} | {memory:.2f}x |"  # type: ignore[arg-type]
    if result["targets"] is None:
        return f"{cells} | |"
    least_speed, most_memory = result["targets"]  # type: ignore[misc]
    speed = median_and_quartiles(ratios)[0]  # type: ignore[arg-type]
    met = " and ".join(
        f"{name} {'met' if is_met else 'missed'}"
        for name, is_met in (("speed", speed >= least_speed), ("memory", memory <= most_memory))
    )
    return f"{cells} >= {least_speed}x, <= {most_memory}x | {met} |"


def main() -> None:
    """Measure, print the table, and write it with all measurements to results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="14M", help="14M, 124M, or [width, layers, heads, vocabulary]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch", type=int, default=32, help="episodes of a forward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes of an update")
    options = parser.parse_args()
    import torch

    from rlhf_recipes.system import describe_hardware

    torch.set_num_threads(1)

    common = ["--shape", options.shape, "--batch", str(options.batch), "--accumulation", str(options.accumulation)]
    results = compared(options.cases, common, options.rounds, list(PEERS))
    lines = ["| | episodes per second, TRL 1.12 = 1 | peak memory, TRL 1.12 = 1 | target | |", "|---|---|---|---|---|"]
    lines += [line_of(result) for result in results[1:]]
    head = f"{datetime.date.today()}, {describe_hardware()}; GPT-2 {options.shape}, {options.rounds} paired updates."
    name = RESULTS / f"ppo_speed_{options.shape.strip('[]').replace(',', '_').replace(' ', '')}"
    name.with_suffix(".md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")
    name.with_suffix(".json").write_text(json.dumps({"head": head, "found": results}, indent=1), encoding="utf-8")
    print("\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
