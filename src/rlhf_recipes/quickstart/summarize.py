"""From the folder of a finished run to the summary that its report shows."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_recipes.data import load_split, plain_text
from rlhf_recipes.quickstart.summary import STAGES, Exchange, Reply, Summary
from rlhf_recipes.quickstart.world.gold import Verdict
from rlhf_recipes.reports import Chart, Series, chart_from_log

CONFIGS = Path(__file__).parent / "configs"
OVEROPTIMIZED = CONFIGS / "overoptimized" / "measured.json"  # a recorded run with the YAML beside it
SHOWN_PROMPTS = 10
LIBRARIES = ("rlhf-recipes", "torch", "transformers", "trl")


@dataclass(frozen=True)
class Answers:
    """A model's answers to the held-out prompts, one text and one gold verdict per prompt.

    corpus_only_right: share of right answers to the questions about facts that only the corpus states.
    """

    texts: Sequence[str]
    verdicts: Sequence[Verdict]
    corpus_only_right: float


def summarize_run(folder: Path, metrics: Mapping[str, Any], answers: Mapping[str, Answers]) -> Summary:
    """Return what the report of a run shows. metrics: as in metrics.json. answers: by stage."""
    corpus_only = load_split(f"{folder}/world/prompts", "corpus_only")
    summary: Summary = {
        "stages": metrics["stages"],
        "seconds": metrics["seconds"],
        "parameters": _read_json(folder / "pretrain" / "metrics.json")["parameters"],
        "charts": {stage: _charts(stage, _read_log(folder / stage)) for stage in STAGES},
        "reliability": metrics["stages"]["reward"]["calibration_table"],
        "exchanges": _exchanges(folder, answers),
        "corpus_only": {
            "facts": len({(row["person"], row["relation"]) for row in corpus_only}),
            "questions": len(corpus_only),
            "right": {stage: model.corpus_only_right for stage, model in answers.items()},
        },
        "reproduction": {
            "command": f"make quickstart SEED={metrics['seed']}",
            "seed": metrics["seed"],
            "versions": {name: _version(name) for name in LIBRARIES},
            "hardware": metrics["hardware"],
            "date": time.strftime("%Y-%m-%d"),
        },
    }
    if OVEROPTIMIZED.is_file():
        recorded = _read_json(OVEROPTIMIZED)
        pairs = zip(summary["charts"]["ppo"][:3], _charts("ppo", recorded["log_history"]), strict=False)
        charts = [_side_by_side(chart, bad, recorded["name"]) for chart, bad in pairs]
        summary["overoptimization"] = {"note": recorded["note"], "charts": charts}
    return summary


def _charts(stage: str, log: Sequence[Mapping[str, Any]]) -> list[Chart]:
    losses = {"loss": "training", "eval_loss": "held out"}
    if stage == "pretrain":
        return [chart_from_log("Pretraining loss (nats per token)", log, losses)]
    if stage == "sft":
        return [chart_from_log("Fine-tuning loss (nats per token)", log, losses)]
    if stage == "reward":
        accuracy = chart_from_log("Pairs ranked correctly (share)", log, {"accuracy": "training"})
        return [chart_from_log("Loss (nats per pair)", log, losses), accuracy]
    titles = {
        "objective/scores": ("Reward model score", "reward model", "ink"),
        "rewards/gold_score": ("Gold score", "gold", "accent"),
        "objective/kl": ("KL to the model before PPO (nats per answer)", "KL", "ink"),
        "completions/mean_length": ("Answer length (tokens)", "length", "ink"),
    }
    return [
        chart_from_log(title, log, {key: name}, x="episode", by="episode", colours=[colour])
        for key, (title, name, colour) in titles.items()
    ]


def _side_by_side(chart: Chart, other: Chart, other_name: str) -> Chart:
    """Return this run's chart with the first line of the other run's, drawn faint."""
    lines = [replace(chart.series[0], name="this run"), Series(other_name, other.series[0].points, "faint")]
    return replace(chart, series=lines)


def _exchanges(folder: Path, answers: Mapping[str, Answers]) -> list[Exchange]:
    """Return the same held-out prompts after each stage, spread evenly over the split."""
    prompts = load_split(f"{folder}/world/prompts", "test")
    count = len(answers["ppo"].verdicts)
    rows = [index * count // SHOWN_PROMPTS for index in range(min(SHOWN_PROMPTS, count))]
    return [
        {
            "prompt": plain_text(prompts[row]["prompt"]),
            "answer": prompts[row]["answer"],
            "replies": {stage: _reply(model, row) for stage, model in answers.items()},
        }
        for row in rows
    ]


def _reply(answers: Answers, row: int) -> Reply:
    verdict = answers.verdicts[row]
    text = answers.texts[row].strip()
    return {"text": text, "right": verdict.right, "polite": verdict.polite, "concise": verdict.concise}


def _read_log(stage_folder: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = _read_json(stage_folder / "trainer_state.json")["log_history"]
    return history


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "from source"
