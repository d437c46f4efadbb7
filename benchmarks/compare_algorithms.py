"""Compare PPO, DPO and RLOO from one fine-tuned model towards one reward model, by the gold score of their answers.

    python benchmarks/compare_algorithms.py runs/quickstart --output_dir runs/comparison --seeds 0 1 2

In      the folder of a finished quickstart: its world, its fine-tuned model, its reward model
Out     comparison.md (a table: the mean over seeds and the value of each), comparison.json (the same and more),
        and each model's folder, log and evaluation

Each training and each evaluation is a separate process, with one thread unless OMP_NUM_THREADS is set, so time and
memory are those of that stage alone. Finished parts are not repeated: run the same command again to continue. The
settings are those of recipes/configs/quickstart/{ppo,dpo,rloo}.yaml."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rlhf_recipes.core.errors import UserError, one_line_errors
from rlhf_recipes.core.files import write_json, write_text
from rlhf_recipes.core.markdown import escape_markdown, table
from rlhf_recipes.system import describe_hardware

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "recipes" / "configs" / "quickstart"
ALGORITHMS = ("ppo", "dpo", "rloo")
GOLD = "rlhf_recipes.quickstart:gold_score"
NEEDED = ("world/prompts", "world/preferences", "world/corpus", "sft", "reward")
START = "sft"
# Columns of the table: metric -> (heading, format).
COLUMNS = {
    "gold_score": ("gold", ".3f"),
    "reward_score": ("reward model", ".2f"),
    "kl": ("KL (nats per answer)", ".2f"),
    "length": ("length (tokens)", ".1f"),
    "eos_share": ("ended by EOS", ".1%"),
    "distinct_2": ("distinct-2", ".3f"),
    "train_seconds": ("training (s)", ".0f"),
    "cpu_seconds": ("CPU time of the process (s)", ".0f"),
    "peak_mib": ("peak memory (MiB)", ".0f"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate each algorithm with each seed, and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--num_prompts", type=int, default=300, help="held-out prompts that each model answers")
    options = parser.parse_args(argv)
    for name in NEEDED:
        if not (options.run / name).is_dir():
            raise UserError(f"{options.run} has no folder {name}; give the folder of a finished quickstart")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {START: [_evaluated(options, options.run / START, START)]}
    for algorithm in options.algorithms:
        results[algorithm] = [_trained_and_evaluated(options, algorithm, seed) for seed in options.seeds]
    _write(options, results)


def training_flags(run: Path, algorithm: str, folder: Path, seed: int) -> list[str]:
    """Return the flags of a training: the algorithm's YAML, and the model, data and rewards of this run."""
    rows = "preferences" if algorithm == "dpo" else "prompts"
    flags = ["--config", str(CONFIGS / f"{algorithm}.yaml"), "--model_name_or_path", f"{run}/{START}"]
    flags += ["--dataset_name", f"{run}/world/{rows}"]
    flags += [] if algorithm == "dpo" else ["--reward", f"{run}/reward", GOLD]
    return [*flags, "--output_dir", str(folder), "--seed", str(seed), "--disable_tqdm", "true"]


def evaluation_flags(run: Path, model: Path, folder: Path, num_prompts: int) -> list[str]:
    """Return the flags of an evaluation: the same prompts and random numbers for every model, sampled as in PPO."""
    flags = ["--config", str(CONFIGS / "eval.yaml"), "--models", str(model), "--reference", f"{run}/{START}"]
    flags += ["--dataset_name", f"{run}/world/prompts", "--text_dataset_name", f"{run}/world/corpus"]
    return [*flags, "--reward_model", f"{run}/reward", "--num_prompts", str(num_prompts), "--output_dir", str(folder)]


def _trained_and_evaluated(options: argparse.Namespace, algorithm: str, seed: int) -> dict[str, Any]:
    name = f"{algorithm}-{seed}"
    folder, cost_file = options.output_dir / name, options.output_dir / f"{name}.json"
    if not cost_file.is_file():  # it is written last: without it the training was interrupted
        flags = training_flags(options.run, algorithm, folder, seed)
        write_json(cost_file, _timed([algorithm, *flags], folder.with_suffix(".log")))
    metrics = _read(folder / "metrics.json")
    cost = _read(cost_file) | {"train_seconds": metrics["seconds"], "steps": metrics["steps"]}
    cost |= {"episodes": metrics["episodes"]} if "episodes" in metrics else {}
    return {"seed": seed, **cost, **_evaluated(options, folder, name)}


def _evaluated(options: argparse.Namespace, model: Path, name: str) -> dict[str, Any]:
    folder = options.output_dir / f"eval-{name}"
    if not (folder / "recipe.yaml").is_file():
        flags = evaluation_flags(options.run, model, folder, options.num_prompts)
        _timed(["eval", *flags], folder.with_suffix(".log"))
    (metrics,) = _read(folder / "metrics.json")["models"].values()
    return dict(metrics)


def _timed(words: list[str], log: Path) -> dict[str, Any]:
    """Run a stage in a separate process, with its output in `log`, and return what it took."""
    command = [sys.executable, "-m", "rlhf_recipes", *words]
    print(shlex.join(["python", *command[1:]]), flush=True)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{words[0]} ended with code {process.returncode}; see {log}")
    per_mib = 2**20 if sys.platform == "darwin" else 2**10  # bytes on a Mac, KiB elsewhere
    return {
        "wall_seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / per_mib,
        "command": shlex.join(["python", *command[1:]]),
    }


def _write(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    reward_model = _read(options.run / "reward" / "metrics.json")
    facts = {
        "run": str(options.run),
        "seeds": options.seeds,
        "prompts": options.num_prompts,
        "reward_model_seconds": reward_model.get("seconds"),
        "reward_accuracy": reward_model.get("reward_accuracy"),
        "hardware": describe_hardware(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(options.output_dir / "comparison.json", {**facts, "results": results})
    text = f"{comparison_table(results)}\n\n{_note(facts)}\n"
    write_text(options.output_dir / "comparison.md", text)
    print(f"\n{text}\n{options.output_dir / 'comparison.md'}")


def comparison_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table: one row per model, with the mean over seeds and, in brackets, the value of each seed."""
    header = ["", *(heading for heading, _ in COLUMNS.values())]
    rows = [
        [escape_markdown(name), *(_cell(runs, *column) for column in COLUMNS.items())]
        for name, runs in results.items()
    ]
    return table(header, rows, range(1, len(header)))


def _cell(runs: list[dict[str, Any]], metric: str, heading_and_format: tuple[str, str]) -> str:
    values = [run[metric] for run in runs if run.get(metric) is not None]
    if not values:
        return ""
    number_format = heading_and_format[1]
    by_seed = ", ".join(format(value, number_format) for value in values)
    return f"**{format(mean(values), number_format)}**" + (f" ({by_seed})" if len(values) > 1 else "")


def _note(facts: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, facts["seeds"]))
    lines = [
        f"{facts['date']}, {facts['hardware']}. Training seeds: {seeds}; the mean, and in brackets each seed's value. "
        f"{facts['prompts']} held-out prompts, the same random numbers for every model. KL is to the fine-tuned model.",
    ]
    if facts["reward_model_seconds"]:
        seconds = f"{facts['reward_model_seconds']:.0f} s"
        lines.append(f"PPO and RLOO also need the reward model, which was trained once in {seconds}; DPO does not.")
    return "\n".join(lines)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    with one_line_errors():
        main()
