"""PPO, DPO and RLOO from one fine-tuned model, towards one reward model of one world, and what gold says of each.

    python benchmarks/compare_algorithms.py runs/quickstart --output_dir runs/comparison --seeds 0 1 2

In      a finished quickstart's folder: its world, its fine-tuned model, its reward model
Out     comparison.md (a table: the mean over seeds and the value of each), comparison.json (the same and more),
        and beside them each model's folder, its log, and its evaluation

Each training and each evaluation is a process of its own, one thread unless OMP_NUM_THREADS says otherwise, so time and
memory are those of that stage alone. What is finished is not done again: the same command goes on where it stopped.
The settings are those of recipes/configs/quickstart/{ppo,dpo,rloo}.yaml.
"""

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
# what is shown: name -> (heading, format)
COLUMNS = {
    "gold_score": ("gold", ".3f"),
    "reward_score": ("reward_model", ".2f"),
    "kl": ("KL (nats an answer)", ".2f"),
    "length": ("length (tokens)", ".1f"),
    "eos_share": ("ended by EOS", ".1%"),
    "distinct_2": ("distinct-2", ".3f"),
    "train_seconds": ("training (s)", ".0f"),
    "cpu_seconds": ("CPU of the process (s)", ".0f"),
    "peak_mib": ("peak memory (MiB)", ".0f"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--num_prompts", type=int, default=300, help="held-out prompts that each model is asked")
    asked = parser.parse_args(argv)
    for name in NEEDED:
        if not (asked.run / name).is_dir():
            raise UserError(f"{asked.run} has no folder {name}; give the folder of a finished quickstart")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asked.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {START: [_evaluated(asked, asked.run / START, START)]}
    for algorithm in asked.algorithms:
        results[algorithm] = [_trained_and_evaluated(asked, algorithm, seed) for seed in asked.seeds]
    _write(asked, results)


def training_flags(run: Path, algorithm: str, folder: Path, seed: int) -> list[str]:
    """What an algorithm is launched with: its YAML, and where this run's model, data and reward model lie."""
    rows = "preferences" if algorithm == "dpo" else "prompts"
    flags = ["--config", str(CONFIGS / f"{algorithm}.yaml"), "--model_name_or_path", f"{run}/{START}"]
    flags += ["--dataset_name", f"{run}/world/{rows}"]
    flags += [] if algorithm == "dpo" else ["--reward", f"{run}/reward", GOLD]
    return [*flags, "--output_dir", str(folder), "--seed", str(seed), "--disable_tqdm", "true"]


def evaluation_flags(run: Path, model: Path, folder: Path, num_prompts: int) -> list[str]:
    """The same prompts and random numbers for every model, sampled as ppo and rloo sample."""
    flags = ["--config", str(CONFIGS / "eval.yaml"), "--models", str(model), "--reference", f"{run}/{START}"]
    flags += ["--dataset_name", f"{run}/world/prompts", "--text_dataset_name", f"{run}/world/corpus"]
    return [*flags, "--reward_model", f"{run}/reward", "--num_prompts", str(num_prompts), "--output_dir", str(folder)]


def _trained_and_evaluated(asked: argparse.Namespace, algorithm: str, seed: int) -> dict[str, Any]:
    name = f"{algorithm}-{seed}"
    folder, spent = asked.output_dir / name, asked.output_dir / f"{name}.json"
    if not spent.is_file():  # written last: without it the training was cut short
        flags = training_flags(asked.run, algorithm, folder, seed)
        write_json(spent, _timed([algorithm, *flags], folder.with_suffix(".log")))
    trained = _read(folder / "metrics.json")
    cost = _read(spent) | {"train_seconds": trained["seconds"], "steps": trained["steps"]}
    cost |= {"episodes": trained["episodes"]} if "episodes" in trained else {}
    return {"seed": seed, **cost, **_evaluated(asked, folder, name)}


def _evaluated(asked: argparse.Namespace, model: Path, name: str) -> dict[str, Any]:
    folder = asked.output_dir / f"eval-{name}"
    if not (folder / "recipe.yaml").is_file():
        flags = evaluation_flags(asked.run, model, folder, asked.num_prompts)
        _timed(["eval", *flags], folder.with_suffix(".log"))
    (measured,) = _read(folder / "metrics.json")["models"].values()
    return dict(measured)


def _timed(words: list[str], log: Path) -> dict[str, Any]:
    """Run a stage in a process of its own; what it took. Its output goes to `log`."""
    command = [sys.executable, "-m", "rlhf_recipes", *words]
    print(shlex.join(["python", *command[1:]]), flush=True)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{words[0]} ended with code {process.returncode}; see {log}")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return {
        "wall_seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / unit,
        "command": shlex.join(["python", *command[1:]]),
    }


def _write(asked: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    reward_model = _read(asked.run / "reward" / "metrics.json")
    facts = {
        "run": str(asked.run),
        "seeds": asked.seeds,
        "prompts": asked.num_prompts,
        "reward_model_seconds": reward_model.get("seconds"),
        "reward_accuracy": reward_model.get("reward_accuracy"),
        "hardware": describe_hardware(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(asked.output_dir / "comparison.json", {**facts, "results": results})
    text = f"{comparison_table(results)}\n\n{_note(facts)}\n"
    write_text(asked.output_dir / "comparison.md", text)
    print(f"\n{text}\n{asked.output_dir / 'comparison.md'}")


def comparison_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """One row a model: of each number the mean over seeds, and in brackets the value of each seed."""
    header = ["", *(heading for heading, _ in COLUMNS.values())]
    rows = [
        [escape_markdown(name), *(_cell(runs, *item) for item in COLUMNS.items())] for name, runs in results.items()
    ]
    return table(header, rows, range(1, len(header)))


def _cell(runs: list[dict[str, Any]], key: str, shown: tuple[str, str]) -> str:
    values = [run[key] for run in runs if run.get(key) is not None]
    if not values:
        return ""
    each = ", ".join(format(value, shown[1]) for value in values)
    return f"**{format(mean(values), shown[1])}**" + (f" ({each})" if len(values) > 1 else "")


def _note(facts: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, facts["seeds"]))
    lines = [
        f"{facts['date']}, {facts['hardware']}. Training seeds: {seeds}; the mean, and in brackets each seed's value. "
        f"{facts['prompts']} held-out prompts, the same random numbers for every model. KL is to the fine-tuned model.",
    ]
    if facts["reward_model_seconds"]:
        lines.append(
            f"PPO and RLOO also need the reward model, which took {facts['reward_model_seconds']:.0f} s of training once; DPO does not."
        )
    return "\n".join(lines)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    with one_line_errors():
        main()
