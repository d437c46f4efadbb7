"""The cost of one PPO update: utilisation of the processor by phase, and how time and memory grow with each size.

    python benchmarks/growth.py [--rounds 3]

Utilisation is the model's floating-point operations over the fastest matrix product of this machine in that precision,
measured in the same minute. The operations are counted from the shape and the real tokens, so padding and
recomputation lower it. Growth is the median of `rounds` updates for each value of one size, with a fitted exponent."""

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
CASES: dict[str, dict[str, Any]] = {  # value: with a value model; upper: trained layers, if not all
    "same algorithm, float32": {"flags": ["--value", "model", "--bf16", "false"], "value": True},
    "defaults": {"flags": ["--value", "head", "--bf16", "unset"], "value": False},
    "two upper layers": {
        "flags": ["--value", "head", "--bf16", "unset", "--unfrozen", "2"], "value": False, "upper": 2
    },
}  # fmt: skip
AXES: dict[str, tuple[str, list[Any], list[float]]] = {  # flag, its values, the size of each
    "response tokens": ("--response", [24, 48, 96], [24, 48, 96]),
    "episodes per update": ("--batch", [16, 32, 64], [16, 32, 64]),
    "vocabulary": ("--shape", ["[384, 6, 6, 2048]", "14M", "[384, 6, 6, 32768]"], [2048, 8192, 32768]),
    "parameters of the layers": (
        "--shape", ["[192, 6, 6, 8192]", "14M", "[576, 6, 9, 8192]"],
        [12 * width**2 * 6 for width in (192, 384, 576)],
    ),
}  # fmt: skip


def matrix_rate(low_precision: bool) -> float:
    """Return the floating-point operations per second of the fastest of several products, with one thread."""
    torch.set_num_threads(1)
    precision, best = torch.bfloat16 if low_precision else torch.float32, 0.0
    for rows, inner, columns in ((1024, 384, 1536), (2048, 384, 1536), (1024, 1024, 1024), (2048, 2048, 2048)):
        left, right = (torch.randn(*shape).to(precision) for shape in ((rows, inner), (columns, inner)))
        for _ in range(10):
            started = time.perf_counter()
            torch.nn.functional.linear(left, right)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


def work(
    case: dict[str, Any], counts: dict[str, float], shape: str = "14M", episodes: int = BATCH
) -> dict[str, float]:
    """Return the operations of each phase of one update.

    counts: the real `tokens` of the update, and how many of them are `answers`.
    """
    width, layers, _, _ = SHAPES[shape]
    tokens, answers = counts["tokens"], counts["answers"]
    trunk, head = trunk_and_head(tokens, answers, shape, episodes)
    upper = trunk * case.get("upper", layers) / layers
    # The last layer's MLP skips tokens whose state is not read, see optimizations/packing.py.
    lower, skipped = trunk - upper, 2 * 8 * width**2 * (tokens - answers)
    values = case["value"] * (trunk - skipped)
    return {
        "generate": trunk + head,
        "score": trunk,
        "forward": lower + 2 * (upper - skipped + head) + values,
        # Backward takes twice the operations of forward; a frozen head has no weight gradient.
        "update": EPOCHS * (3 * (upper - skipped) + (2 if "upper" in case else 3) * head + 3 * values),
    }


def trunk_and_head(tokens: float, logits: float, shape: str = "14M", episodes: int = BATCH) -> tuple[float, float]:
    """Return the operations of a forward pass through the layers, and those of the logits of `logits` tokens."""
    width, layers, _, vocabulary = SHAPES[shape]
    layer = 2 * 12 * width**2 + 2 * tokens / episodes * width  # per token, with attention to half of the row
    return layers * layer * tokens, 2 * width * vocabulary * logits


def work_of_trl(prompt: int = 48, response: int = 48) -> float:
    """Return the operations of an update of TRL 1.12's PPO: padded rows, and logits of every token that is read."""
    tokens = BATCH * (prompt + response)
    trunk, head = trunk_and_head(tokens, tokens)
    generation = trunk + trunk_and_head(tokens, BATCH * response)[1]
    rollout = generation + (trunk + head) + 2 * trunk  # the reference; value and reward model
    return rollout + EPOCHS * 3 * (2 * trunk + head)


def trl_to_ours(draws: int = 1000) -> float:
    """Return TRL's operations over ours for the same algorithm: the mean over random batches of the prompts."""
    lengths = [len(row) for row in prompts_of(SimpleNamespace(shape="14M", prompt=48))["input_ids"]]
    generator, case = random.Random(0), CASES["same algorithm, float32"]
    ratios = []
    for _ in range(draws):
        batch = generator.sample(lengths, BATCH)
        ours = work(case, {"tokens": sum(batch) + BATCH * 48, "answers": BATCH * 48})
        ratios.append(work_of_trl(max(batch)) / sum(ours.values()))
    return sum(ratios) / draws


def measured(flags: list[str], rounds: int) -> dict[str, Any]:
    """Run updates with these flags and return the measurements of the one with the median time."""
    worker = Worker("ours " + " ".join(flags), "ppo_worker.py", ["ours", *flags])
    try:
        updates = [worker.work() for _ in range(rounds + 2)][2:]
    finally:
        worker.close()
    return sorted(updates, key=lambda update: float(update["seconds"]))[rounds // 2]


def utilisation(rounds: int) -> tuple[list[str], dict[str, Any]]:
    """Return the lines of the table, and all that was measured."""
    lines = ["| | generate | score | forward | update | whole |", "|---|---|---|---|---|---|"]
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        rates_before = {low_precision: matrix_rate(low_precision) for low_precision in (False, True)}
        update = measured(case["flags"], rounds)
        rates = {low_precision: max(rate, matrix_rate(low_precision)) for low_precision, rate in rates_before.items()}
        operations = work(case, update)
        seconds = {phase: update[f"time/{phase}"] for phase in operations} | {"whole": update["seconds"]}
        # The reward model computes in float32.
        ideal = {phase: count / rates[update["bf16"] and phase != "score"] for phase, count in operations.items()}
        ideal["whole"] = sum(ideal.values())
        cells = [f"{ideal[phase] / elapsed:.0%} ({elapsed:.2f} s)" for phase, elapsed in seconds.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        results[name] = {
            "update": update,
            "operations": operations,
            "rates": {"float32": rates[False], "bfloat16": rates[True]},
        }
    lines += ["", f"TRL 1.12's PPO takes {trl_to_ours():.2f}x the operations for the same algorithm (1,000 updates)."]
    return lines, results


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Fit a power of the sizes to the costs: the slope of the least-squares line through the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def growth(rounds: int) -> dict[str, Any]:
    """Return for each axis the sizes, the time and memory of an update, and their fitted exponents."""
    results: dict[str, Any] = {}
    for axis, (flag, values, sizes) in AXES.items():
        updates = [measured(["--value", "head", "--bf16", "unset", flag, str(value)], rounds) for value in values]
        results[axis] = {
            "sizes": sizes,
            "seconds": [update["seconds"] for update in updates],
            "memory": [update["above_imports"] for update in updates],
        }
        for cost in ("seconds", "memory"):
            results[axis][f"{cost}_exponent"] = exponent(sizes, results[axis][cost])
        print(axis, {cost: round(results[axis][f"{cost}_exponent"], 2) for cost in ("seconds", "memory")}, flush=True)
    return results


def short(size: float) -> str:
    """Format a size for an axis: 2,048 or 10.6M."""
    return f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size:,.0f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot time and memory against each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(results), figsize=(3.1 * len(results), 5.2), constrained_layout=True)
    for column, (axis, result) in enumerate(results.items()):
        for row, (cost, unit) in enumerate((("seconds", "seconds per update"), ("memory", "MiB above the imports"))):
            axes = panels[row][column]
            axes.loglog(result["sizes"], result[cost], "o-", color=f"C{row}")
            title = f"grows as size^{result[cost + '_exponent']:.2f}"
            axes.set(xlabel=axis, ylabel=unit if column == 0 else "", title=title)
            axes.xaxis.set_minor_formatter("")
            axes.set_xticks(result["sizes"], [short(size) for size in result["sizes"]])
            axes.yaxis.set_minor_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print the tables, and write them with a plot and all measurements to results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from rlhf_recipes.system import describe_hardware

    torch.set_num_threads(1)

    head = f"{datetime.date.today()}, {describe_hardware()}; GPT-2 14M, {BATCH} episodes per update."
    lines, used = utilisation(options.rounds)
    grown = growth(options.rounds)
    draw(grown, RESULTS / "growth.png")
    lines += ["", "| size | seconds grow as | memory grows as |", "|---|---|---|"]
    lines += [
        f"| {axis} | size^{result['seconds_exponent']:.2f} | size^{result['memory_exponent']:.2f} |"
        for axis, result in grown.items()
    ]
    measurements = {"head": head, "used": used, "grown": grown}
    (RESULTS / "growth.md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")
    (RESULTS / "growth.json").write_text(json.dumps(measurements, indent=1), encoding="utf-8")
    print("\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
