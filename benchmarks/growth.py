"""What one update costs, and how that grows: utilisation of the processor by phase, and fitted exponents.

    python benchmarks/growth.py [--rounds 3]

Utilisation is the model's floating-point operations, counted from its shape and the real tokens (padding and what is
computed twice count against us), over the fastest matrix product that this machine was seen to do in that precision,
in the same minute. Growth is the median of `rounds` updates while one size is varied.
"""

import argparse
import datetime
import json
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peers import Worker
from ppo_worker import SHAPES, prompts_of

RESULTS = Path(__file__).parent / "results"
EPOCHS, BATCH = 4, 32
CASES: dict[str, dict[str, Any]] = {
    "same algorithm, float32": {"flags": ["--value", "model", "--bf16", "false"], "value": True},
    "defaults": {"flags": ["--value", "head", "--bf16", "unset"], "value": False},
    "two upper layers": {
        "flags": ["--value", "head", "--bf16", "unset", "--unfrozen", "2"], "value": False, "upper": 2
    },
}  # fmt: skip
AXES: dict[str, tuple[str, list[Any], list[float]]] = {
    "response tokens": ("--response", [24, 48, 96], [24, 48, 96]),
    "episodes an update": ("--batch", [16, 32, 64], [16, 32, 64]),
    "vocabulary": ("--shape", ["[384, 6, 6, 2048]", "14M", "[384, 6, 6, 32768]"], [2048, 8192, 32768]),
    "parameters of the layers": (
        "--shape", ["[192, 6, 6, 8192]", "14M", "[576, 6, 9, 8192]"],
        [12 * width**2 * 6 for width in (192, 384, 576)],
    ),
}  # fmt: skip


def matrix_rate(low: bool) -> float:
    """The fastest of several products, in floating-point operations a second, by one thread."""
    torch.set_num_threads(1)
    best = 0.0
    for rows, inner, columns in ((1024, 384, 1536), (2048, 384, 1536), (1024, 1024, 1024), (2048, 2048, 2048)):
        left, right = (
            torch.randn(*shape).to(torch.bfloat16 if low else torch.float32)
            for shape in ((rows, inner), (columns, inner))
        )
        for _ in range(10):
            started = time.perf_counter()
            torch.nn.functional.linear(left, right)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


def work(case: dict[str, Any], said: dict[str, float], shape: str = "14M", episodes: int = BATCH) -> dict[str, float]:
    """Operations of each phase of one update, from the shape and the real tokens."""
    width, layers, _, _ = SHAPES[shape]
    tokens, answers = said["tokens"], said["answers"]
    whole, head = trunk_and_head(tokens, answers, shape, episodes)
    upper = whole * case.get("upper", layers) / layers
    lower, spared = whole - upper, 2 * 8 * width**2 * (tokens - answers)  # of the last layer, see models/packed.py
    values = case["value"] * (whole - spared)
    return {
        "generate": whole + head,
        "score": whole,
        "forward": lower + 2 * (upper - spared + head) + values,
        # Forward and, twice as much, backward; a frozen head has no gradient of its own weights.
        "update": EPOCHS * (3 * (upper - spared) + (2 if "upper" in case else 3) * head + 3 * values),
    }


def trunk_and_head(tokens: float, logits: float, shape: str = "14M", episodes: int = BATCH) -> tuple[float, float]:
    """Operations of a forward pass of all rows through the layers, and of the logits of so many tokens."""
    width, layers, _, vocabulary = SHAPES[shape]
    layer = 2 * 12 * width**2 + 2 * tokens / episodes * width  # a token; attention to half of the row included
    return layers * layer * tokens, 2 * width * vocabulary * logits


def work_of_trl(prompt: int = 48, response: int = 48) -> float:
    """Operations of an update of TRL 1.12's PPO: each row as wide as the widest, and logits of all that is read again."""
    tokens = BATCH * (prompt + response)
    whole, head = trunk_and_head(tokens, tokens)
    generated = whole + trunk_and_head(tokens, BATCH * response)[1]
    rollout = generated + (whole + head) + 2 * whole  # the reference; value and reward model
    return rollout + EPOCHS * 3 * (2 * whole + head)


def trl_to_ours(draws: int = 1000) -> float:
    """How many times our operations TRL's PPO takes for the same algorithm: the mean over batches of the prompts."""
    lengths = [len(row) for row in prompts_of(SimpleNamespace(shape="14M", prompt=48))["input_ids"]]
    draw, case = random.Random(0), CASES["same algorithm, float32"]
    ratios = []
    for _ in range(draws):
        batch = draw.sample(lengths, BATCH)
        ours = work(case, {"tokens": sum(batch) + BATCH * 48, "answers": BATCH * 48})
        ratios.append(work_of_trl(max(batch)) / sum(ours.values()))
    return sum(ratios) / draws


def measured(flags: list[str], rounds: int) -> dict[str, Any]:
    worker = Worker("ours " + " ".join(flags), "ppo_worker.py", ["ours", *flags])
    try:
        said = [worker.work() for _ in range(rounds + 2)][2:]
    finally:
        worker.close()
    return sorted(said, key=lambda each: float(each["seconds"]))[rounds // 2]


def utilisation(rounds: int) -> tuple[list[str], dict[str, Any]]:
    lines = ["| | generate | score | forward | update | whole |", "|---|---|---|---|---|---|"]
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        before = {low: matrix_rate(low) for low in (False, True)}
        said = measured(case["flags"], rounds)
        rates = {low: max(rate, matrix_rate(low)) for low, rate in before.items()}
        operations = work(case, said)
        took = {phase: said[f"time/{phase}"] for phase in operations} | {"whole": said["seconds"]}
        # A reward model reads in its own precision, float32.
        ideal = {phase: done / rates[said["bf16"] and phase != "score"] for phase, done in operations.items()}
        ideal["whole"] = sum(ideal.values())
        cells = [f"{ideal[phase] / seconds:.0%} ({seconds:.2f} s)" for phase, seconds in took.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        found[name] = {
            "said": said,
            "operations": operations,
            "rates": {"float32": rates[False], "bfloat16": rates[True]},
        }
    lines += [
        "",
        f"TRL 1.12's PPO takes {trl_to_ours():.2f}x the operations of the same algorithm (mean of 1,000 updates).",
    ]
    return lines, found


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    across, up = [math.log(each) for each in sizes], [math.log(each) for each in costs]
    middle, height = sum(across) / len(across), sum(up) / len(up)
    return sum((x - middle) * (y - height) for x, y in zip(across, up, strict=True)) / sum(
        (x - middle) ** 2 for x in across
    )


def growth(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for axis, (flag, values, sizes) in AXES.items():
        said = [measured(["--value", "head", "--bf16", "unset", flag, str(value)], rounds) for value in values]
        found[axis] = {
            "sizes": sizes,
            "seconds": [each["seconds"] for each in said],
            "memory": [each["above_imports"] for each in said],
        }
        for what in ("seconds", "memory"):
            found[axis][f"{what}_exponent"] = exponent(sizes, found[axis][what])
        print(axis, {what: round(found[axis][f"{what}_exponent"], 2) for what in ("seconds", "memory")}, flush=True)
    return found


def short(size: float) -> str:
    return f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size:,.0f}"


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(found), figsize=(3.1 * len(found), 5.2), constrained_layout=True)
    for column, (axis, each) in enumerate(found.items()):
        for row, (what, unit) in enumerate((("seconds", "seconds an update"), ("memory", "MiB above the imports"))):
            axes = panels[row][column]
            axes.loglog(each["sizes"], each[what], "o-", color=f"C{row}")
            axes.set(
                xlabel=axis, ylabel=unit if column == 0 else "", title=f"grows as size^{each[what + '_exponent']:.2f}"
            )
            axes.xaxis.set_minor_formatter("")
            axes.set_xticks(each["sizes"], [short(size) for size in each["sizes"]])
            axes.yaxis.set_minor_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    from rlhf_recipes.system import describe_hardware

    torch.set_num_threads(1)

    head = f"{datetime.date.today()}, {describe_hardware()}; GPT-2 14M, {BATCH} episodes an update."
    lines, used = utilisation(asked.rounds)
    grown = growth(asked.rounds)
    draw(grown, RESULTS / "growth.png")
    lines += ["", "| grows with | seconds | memory |", "|---|---|---|"]
    lines += [
        f"| {axis} | size^{each['seconds_exponent']:.2f} | size^{each['memory_exponent']:.2f} |"
        for axis, each in grown.items()
    ]
    (RESULTS / "growth.md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")
    (RESULTS / "growth.json").write_text(
        json.dumps({"head": head, "used": used, "grown": grown}, indent=1), encoding="utf-8"
    )
    print("\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
