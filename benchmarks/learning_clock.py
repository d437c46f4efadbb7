"""Held-out score against seconds of training: our PPO, TRL 1.12's PPO, and RLOO and GRPO of the installed TRL.

    make quickstart
    python benchmarks/learning_clock.py quickstart runs/quickstart --output_dir runs/clock --seconds 120
    python benchmarks/learning_clock.py imdb runs/imdb --dataset_name REVIEWS --output_dir runs/clock_imdb --seconds 600

Every trainer starts from the same policy, with the same prompts and the same reward model, whose scores have variance
1. The learning rate falls linearly to zero over the given seconds. RLOO and GRPO use the real positions of padded
prompts, which TRL's trainers do not for GPT-2. The answers to 300 held-out prompts are scored; that time does not
count. Finished runs are not repeated. Two runs share the machine at a time, each with one thread."""

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

Curves = dict[str, list[list[dict[str, float]]]]  # trainer -> for each seed the points that were measured

TRAINERS = {  # name: (algorithm, flags)
    "ours": ("ours", []),
    "ours, upper layers": ("ours", ["--upper"]),
    "TRL 1.12 PPO": ("trl_ppo", []),
    "TRL 1.12 PPO, autocast": ("trl_ppo", ["--autocast"]),
    "TRL RLOO": ("rloo", []),
    "TRL GRPO": ("grpo", []),
}
# policy: folder below the run; penalty: for a missing EOS; upper: layers that "ours, upper layers"
# trains; wide: the model is wide enough to gain by bfloat16.
WORLDS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "policy": "sft",
        "response": 40,
        "min_new_tokens": 0,
        "penalty": 1.0,
        "batch": 96,
        "prompt_tokens": None,
        "upper": 1,
        "wide": False,
    },
    "imdb": {
        "policy": "pretrain",
        "response": 48,
        "min_new_tokens": 48,
        "penalty": None,
        "batch": 64,
        "prompt_tokens": 8,
        "upper": 2,
        "wide": True,
    },
}


def prepare(options: Any, folder: Path) -> None:
    """Save policy, reward model, prompts and settings in a form that every trainer can load."""
    from rlhf_recipes.core.arguments import DatasetArguments
    from rlhf_recipes.data import PROMPT, TEXT, FormOptions, load_rows, prompt_ids
    from rlhf_recipes.models import load_causal_lm, load_reward_model, load_tokenizer
    from rlhf_recipes.stages.ppo import with_prompts

    world = WORLDS[options.world]
    policy, reward = str(options.run / world["policy"]), str(options.run / "reward")
    tokenizer = load_tokenizer(policy)
    load_causal_lm(policy).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    reward_model: Any = load_reward_model(reward)
    weight, deviation = reward_model.score.weight.detach(), reward_model.config.score_std
    single = weight if len(weight) == 1 else weight[1:] - weight[:1]  # the log-odds of the second label
    reward_model.score = torch.nn.Linear(weight.shape[1], 1, bias=False)
    reward_model.score.weight = torch.nn.Parameter(single / deviation)
    reward_model.config.num_labels = 1
    reward_model.save_pretrained(folder / "reward_model")
    name = options.dataset_name or str(options.run / "world" / "prompts")
    form = FormOptions((TEXT if world["prompt_tokens"] else PROMPT,), keep_columns=True)
    loaded = load_rows(DatasetArguments(dataset_name=name, max_train_samples=4000, max_test_samples=300), form)
    for split, rows in (("train", loaded.train), ("test", loaded.test)):
        rows = with_prompts(rows, tokenizer, world["prompt_tokens"])
        encoded = [{**row, "input_ids": prompt_ids(row["prompt"], tokenizer)} for row in rows]
        (folder / f"{split}.json").write_text(json.dumps(encoded))
    (folder / "settings.json").write_text(json.dumps(world | {"world": options.world, "deviation": deviation}))


def result_file(folder: Path, trainer: str, seed: int) -> Path:
    """Return the file with the points of a run."""
    return folder / f"{trainer.replace(' ', '_').replace(',', '')}_{seed}.json"


def run(trainer: str, seed: int, options: Any, folder: Path) -> None:
    """Run a trainer with a seed, unless its result exists."""
    algorithm, flags = TRAINERS[trainer]
    out = result_file(folder, trainer, seed)
    if out.is_file():
        return
    python = python_with("trl==1.12.0" if algorithm == "trl_ppo" else None)
    rate = ["--learning_rate", str(options.rates.get(trainer, options.learning_rate))]
    words = [algorithm, str(folder), str(out), "--seed", str(seed), "--seconds", str(options.seconds), *flags, *rate]
    words += ["--every", str(options.seconds / options.looks)]
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(HERE.parent / "src")}
    with out.with_suffix(".log").open("w") as log:
        command = [python, str(HERE / "learning_worker.py"), *words]
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    print(f"{trainer}, seed {seed}: {'done' if out.is_file() else f'failed ({code}), see {log.name}'}", flush=True)


def at(points: list[dict[str, float]], seconds: float, metric: str) -> float:
    """Return the last measurement of a metric up to that time."""
    return [point[metric] for point in points if point["seconds"] <= seconds][-1]


def summary(folder: Path, options: Any) -> str:
    """Write all points and the plot, and return the tables of the score and, for the quickstart, the reward."""
    curves: Curves = {}
    for trainer in TRAINERS:
        files = [result_file(folder, trainer, seed) for seed in options.seeds]
        curves[trainer] = [json.loads(file.read_text()) for file in files if file.is_file()]
    (folder / "clock.json").write_text(json.dumps(curves), encoding="utf-8")
    draw(curves, folder / "clock.png", options)
    text = table(curves, options.seconds, "score")
    if options.world == "quickstart":
        text += (
            f"\n\nThe reward model's score, which is trained on:\n\n{table(curves, options.seconds, 'reward_model')}"
        )
    return text


def table(curves: Curves, seconds: float, metric: str) -> str:
    """Return the mean over seeds (lowest and highest) after an eighth, a quarter, a half and all of the time."""
    budgets = [seconds * share for share in (1 / 8, 1 / 4, 1 / 2, 1)]
    lines = ["| | " + " | ".join(f"{budget:.0f} s" for budget in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for trainer, runs in curves.items():
        if not runs:
            continue
        cells = []
        for budget in budgets:
            values = [at(points, budget, metric) for points in runs]
            cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        lines.append(f"| {trainer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(curves: Curves, path: Path, options: Any) -> None:
    """Plot the score of every run against seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), constrained_layout=True)
    for colour, (trainer, runs) in enumerate(curves.items()):
        for number, points in enumerate(runs):
            axes.plot(
                [point["seconds"] for point in points], [point["score"] for point in points], color=f"C{colour}",
                alpha=0.8, linewidth=1.6, label=trainer if number == 0 else None,
            )  # fmt: skip
    score = {"quickstart": "gold score", "imdb": "probability of a positive review"}[options.world]
    axes.set(
        xlabel="seconds of training",
        ylabel=f"{score}, held-out prompts",
        title=f"{options.world}: score against training time",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


def main() -> None:
    """Prepare the world, run every trainer with every seed, and write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=list(WORLDS))
    parser.add_argument("run", type=Path, help="folder of a finished quickstart, or of the imdb recipes")
    parser.add_argument("--dataset_name", help="imdb: a folder of reviews, or its Hub id")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120, help="training time of each run")
    parser.add_argument("--looks", type=int, default=24, help="measurements of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--trainers", nargs="+", choices=list(TRAINERS), help="by default all; autocast only for a wide model"
    )
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--rates", type=json.loads, default={}, help='learning rates by trainer: {"TRL RLOO": 1e-4}')
    parser.add_argument("--at_once", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    options.trainers = options.trainers or [
        trainer for trainer, (_, flags) in TRAINERS.items() if WORLDS[options.world]["wide"] or flags != ["--autocast"]
    ]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not (options.output_dir / "settings.json").is_file():
        prepare(options, options.output_dir)
    with ThreadPoolExecutor(options.at_once) as pool:
        runs = itertools.product(options.seeds, options.trainers)
        list(pool.map(lambda pair: run(pair[1], pair[0], options, options.output_dir), runs))
    from rlhf_recipes.system import describe_hardware

    runs_text = f"{options.at_once} runs at a time, one thread each; seeds {options.seeds}"
    head = f"{datetime.date.today()}, {describe_hardware()}; {runs_text}."
    text = f"{head}\n\n{summary(options.output_dir, options)}\n"
    (options.output_dir / "clock.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
