"""What is learnt after how many seconds: our PPO against TRL 1.12's, and against RLOO and GRPO of today's TRL.

    make quickstart
    python benchmarks/learning_clock.py quickstart runs/quickstart --output_dir runs/clock --seconds 120
    python benchmarks/learning_clock.py imdb runs/imdb --dataset_name REVIEWS --output_dir runs/clock_imdb --seconds 600

Everyone starts from the same policy, asks the same prompts, and is scored by the same reward model, whose scores have unit spread;
the learning rate falls linearly to nothing over the time. RLOO and GRPO read padded prompts at their real positions, which
TRL's own do not for GPT-2. What is measured are answers to 300 held-out prompts, for which the clock stands still.
A run that is there already is not run again. Two runs share the machine's cores at a time, each with one thread.
"""

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peers import HERE, OFFLINE, python_with

Curves = dict[str, list[list[dict[str, float]]]]  # by kind of run, of each seed, what was measured at each look

KINDS = {  # algorithm, flags
    "ours": ("ours", []),
    "ours, upper layers": ("ours", ["--upper"]),
    "TRL 1.12 PPO": ("trl_ppo", []),
    "TRL 1.12 PPO, autocast": ("trl_ppo", ["--autocast"]),
    "TRL RLOO": ("rloo", []),
    "TRL GRPO": ("grpo", []),
}
WORLDS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "policy": "sft",
        "response": 40,
        "least": 0,
        "penalty": 1.0,
        "batch": 96,
        "prompt_tokens": None,
        "upper": 1,
        "wide": False,  # enough for bfloat16 to gain anything
    },
    "imdb": {
        "policy": "pretrain",
        "response": 48,
        "least": 48,
        "penalty": None,
        "batch": 64,
        "prompt_tokens": 8,
        "upper": 2,
        "wide": True,
    },
}


def prepare(asked: Any, folder: Path) -> None:
    """Policy, reward model and prompts, in a form that every trainer takes."""
    from rlhf_recipes.core.arguments import DatasetArguments
    from rlhf_recipes.data import load_train_and_test, prompt_ids
    from rlhf_recipes.models import load_causal_lm, load_reward_model, load_tokenizer
    from rlhf_recipes.stages.ppo import with_prompts

    world = WORLDS[asked.world]
    policy, reward = str(asked.run / world["policy"]), str(asked.run / "reward")
    tokenizer = load_tokenizer(policy)
    load_causal_lm(policy).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    reward_model: Any = load_reward_model(reward)
    weight, spread, shift = (
        reward_model.score.weight.detach(),
        reward_model.config.score_std,
        reward_model.config.score_mean,
    )
    single = weight if len(weight) == 1 else weight[1:] - weight[:1]  # the log-odds of the second label
    reward_model.score = torch.nn.Linear(weight.shape[1], 1, bias=False)
    reward_model.score.weight = torch.nn.Parameter(single / spread)
    reward_model.config.num_labels = 1
    reward_model.save_pretrained(folder / "reward_model")
    name = asked.dataset_name or str(asked.run / "world" / "prompts")
    splits = load_train_and_test(DatasetArguments(dataset_name=name, max_train_samples=4000, max_test_samples=300))
    for split, rows in zip(("train", "test"), splits, strict=True):
        rows = with_prompts(rows, tokenizer, world["prompt_tokens"])
        told = [{**row, "input_ids": prompt_ids(row["prompt"], tokenizer)} for row in rows]
        (folder / f"{split}.json").write_text(json.dumps(told))
    told = world | {"world": asked.world, "spread": spread, "shift": 0.0, "mean": shift}
    (folder / "told.json").write_text(json.dumps(told))


def run(kind: str, seed: int, asked: Any, folder: Path) -> None:
    algorithm, flags = KINDS[kind]
    out = folder / f"{kind.replace(' ', '_').replace(',', '')}_{seed}.json"
    if out.is_file():
        return
    python = python_with("trl==1.12.0" if algorithm == "trl_ppo" else None)
    rate = ["--learning_rate", str(asked.rates.get(kind, asked.learning_rate))]
    words = [algorithm, str(folder), str(out), "--seed", str(seed), "--seconds", str(asked.seconds), *flags, *rate]
    words += ["--every", str(asked.seconds / asked.looks)]
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(HERE.parent / "src")}
    with out.with_suffix(".log").open("w") as log:
        command = [python, str(HERE / "learning_worker.py"), *words]
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    print(f"{kind}, seed {seed}: {'done' if out.is_file() else f'failed ({code}), see {log.name}'}", flush=True)


def at(points: list[dict[str, float]], seconds: float, what: str) -> float:
    """What was measured at the last look up to that time."""
    return [point[what] for point in points if point["seconds"] <= seconds][-1]


def told(folder: Path, asked: Any) -> str:
    """The table of scores, and in the quickstart's world that of the reward model's, which is what is raised; all points and the
    plot beside it."""
    curves: Curves = {}
    for kind in KINDS:
        files = [folder / f"{kind.replace(' ', '_').replace(',', '')}_{seed}.json" for seed in asked.seeds]
        curves[kind] = [json.loads(file.read_text()) for file in files if file.is_file()]
    (folder / "clock.json").write_text(json.dumps(curves), encoding="utf-8")
    draw(curves, folder / "clock.png", asked)
    text = table(curves, asked.seconds, "score")
    if asked.world == "quickstart":
        text += f"\n\nThe reward model's score:\n\n{table(curves, asked.seconds, 'reward_model')}"
    return text


def table(curves: Curves, seconds: float, what: str) -> str:
    """The mean of the seeds (least and most) at an eighth, a quarter, a half and the whole of the time."""
    budgets = [seconds * share for share in (1 / 8, 1 / 4, 1 / 2, 1)]
    lines = ["| | " + " | ".join(f"{budget:.0f} s" for budget in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for kind, runs in curves.items():
        if not runs:
            continue
        cells = []
        for budget in budgets:
            found = [at(points, budget, what) for points in runs]
            cells.append(f"{sum(found) / len(found):.3f} ({min(found):.3f}-{max(found):.3f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(curves: Curves, path: Path, asked: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), constrained_layout=True)
    for colour, (kind, runs) in enumerate(curves.items()):
        for number, points in enumerate(runs):
            axes.plot(
                [point["seconds"] for point in points], [point["score"] for point in points], color=f"C{colour}",
                alpha=0.8, linewidth=1.6, label=kind if number == 0 else None,
            )  # fmt: skip
    what = {"quickstart": "gold score", "imdb": "probability of a positive review"}[asked.world]
    axes.set(
        xlabel="seconds of training",
        ylabel=f"{what}, held-out prompts",
        title=f"{asked.world}: learnt against the clock",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=list(WORLDS))
    parser.add_argument("run", type=Path, help="what the quickstart, or the imdb recipes, left")
    parser.add_argument("--dataset_name", help="imdb: a folder of reviews, or its Hub id")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--looks", type=int, default=24, help="how often held-out prompts are answered")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), help="by default all that the world is wide enough for"
    )
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--rates", type=json.loads, default={}, help='learning rates by name: {"TRL RLOO": 1e-4}')
    parser.add_argument("--at_once", type=int, default=2)
    asked = parser.parse_args()
    asked.kinds = asked.kinds or [
        kind for kind, (_, flags) in KINDS.items() if WORLDS[asked.world]["wide"] or flags != ["--autocast"]
    ]
    asked.output_dir.mkdir(parents=True, exist_ok=True)
    if not (asked.output_dir / "told.json").is_file():
        prepare(asked, asked.output_dir)
    with ThreadPoolExecutor(asked.at_once) as pool:
        list(
            pool.map(lambda one: run(*one[::-1], asked, asked.output_dir), itertools.product(asked.seeds, asked.kinds))
        )
    from rlhf_recipes.system import describe_hardware

    head = f"{datetime.date.today()}, {describe_hardware()}; {asked.at_once} runs at a time, one thread each; seeds {asked.seeds}."
    text = f"{head}\n\n{told(asked.output_dir, asked)}\n"
    (asked.output_dir / "clock.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
