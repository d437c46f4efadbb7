"""Episodes per second and peak memory: ours against the PPOTrainer that TRL had up to 1.12, update by update in turns.

    python benchmarks/ppo_speed.py [--shape 124M] [--rounds 5] [--cases "same algorithm" defaults]

Every case is a process, and so is TRL's trainer; they take turns, an update each, on the same random GPT-2, prompts of 8 to
48 tokens from one pool, which each shuffles in its own way, and answers of 48 tokens that no stop token ends. The ratio is
taken round by round; told are its median and quartiles. Memory is the peak resident set above what the imports take.
TRL 1.12 computes in float32, whatever its `bf16` says; under autocast it is as `accelerate launch --mixed_precision bf16` has it.
"""

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from peers import Worker, as_ratio, spread, take_turns

RESULTS = Path(__file__).parent / "results"
TRL = "trl==1.12.0"
PEERS = {"TRL 1.12": ["--bf16", "false"], "TRL 1.12, autocast": ["--bf16", "true"]}
CASES: dict[str, tuple[list[str], float, float]] = {  # flags; targets: at least so fast, at most so much memory
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
    """All cases and TRL's trainer, an update each in every round; all ratios are to the first of the peers."""
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
    found: list[dict[str, object]] = []
    for case, said in zip([*peers[1:], *cases], others, strict=True):
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(theirs, said, strict=True)]
        memory = said[-1]["above_imports"] / theirs[-1]["above_imports"]
        targets = CASES[case][1:] if case in CASES else None
        found.append({"case": case, "ratios": ratios, "memory": memory, "targets": targets, "ours": said})
    return [{"case": "TRL 1.12", "theirs": theirs}, *found]


def line_of(found: dict[str, object]) -> str:
    middle, memory = spread(found["ratios"])[0], float(found["memory"])  # type: ignore[arg-type]
    told = f"| {found['case']} | {as_ratio(found['ratios'])} | {memory:.2f}x |"  # type: ignore[arg-type]
    if found["targets"] is None:
        return f"{told} | |"
    faster, smaller = found["targets"]  # type: ignore[misc]
    met = " and ".join(
        f"{what} {'met' if so else 'missed'}"
        for what, so in (("speed", middle >= faster), ("memory", memory <= smaller))
    )
    return f"{told} >= {faster}x, <= {smaller}x | {met} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="14M", help="14M, 124M, or [width, layers, heads, vocabulary]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    asked = parser.parse_args()
    import torch

    from rlhf_recipes.system import describe_hardware

    torch.set_num_threads(1)

    common = ["--shape", asked.shape, "--batch", str(asked.batch), "--accumulation", str(asked.accumulation)]
    found = compared(asked.cases, common, asked.rounds, list(PEERS))
    lines = ["| | episodes per second, to TRL 1.12's | peak memory | target | |", "|---|---|---|---|---|"]
    lines += [line_of(each) for each in found[1:]]
    head = f"{datetime.date.today()}, {describe_hardware()}; GPT-2 {asked.shape}, {asked.rounds} paired updates."
    name = RESULTS / f"ppo_speed_{asked.shape.strip('[]').replace(',', '_').replace(' ', '')}"
    name.with_suffix(".md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")
    name.with_suffix(".json").write_text(json.dumps({"head": head, "found": found}, indent=1), encoding="utf-8")
    print("\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
