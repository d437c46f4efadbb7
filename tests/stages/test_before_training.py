"""Held-out numbers from before the first step are reported beside those from after, and measuring them changes nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from programs import small_runs
from programs.small_runs import STAGES, identical, weights_in, without_times

NUMBERS = {
    "pretrain": {"perplexity", "bits_per_byte", "loss"},
    "sft": {"eval_loss", "perplexity", "bits_per_byte", "loss"},
    "reward": {"eval_loss", "reward_accuracy", "margin", "score_mean", "score_std"},
    "ppo": {"eval_objective/scores", "eval_objective/kl", "eval_completions/mean_length"},
}


def numbers(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name != "seconds"}


def training_log(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [without_times(entry) for entry in history if entry["step"]]


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_from_before_are_reported_beside_those_from_after(stage: str, runs: Path) -> None:
    changes = {"lr_scheduler_type": "constant", "bf16": True} if stage == "pretrain" else {}
    plain = small_runs.run(stage, runs, f"{stage} plain", eval_before_training=False, **changes)
    both = small_runs.run(stage, runs, f"{stage} both", save_total_limit=9, **changes)
    before = {name: value for name, value in numbers(both).items() if name.removesuffix("_before") in NUMBERS[stage]}
    assert {f"{name}_before" for name in NUMBERS[stage]} <= set(before)
    assert identical(weights_in(both), weights_in(plain))
    assert training_log(both) == training_log(plain)
    assert numbers(plain) == {name: value for name, value in numbers(both).items() if name in numbers(plain)}
    still = small_runs.run(stage, runs, f"{stage} still", learning_rate=0.0, **changes)
    measured = numbers(still)
    for name in NUMBERS[stage]:
        assert measured[name] == pytest.approx(measured[f"{name}_before"], rel=1e-6, abs=1e-7)
        assert measured[f"{name}_before"] == pytest.approx(numbers(both)[f"{name}_before"], rel=1e-6, abs=1e-7)


def test_a_resumed_run_reports_the_numbers_from_before_its_first_step(runs: Path) -> None:
    whole = small_runs.run("sft", runs, "sft whole", save_total_limit=9)
    place = runs / "sft part"
    shutil.copytree(whole / "checkpoint-4", place / "checkpoint-4")
    small_runs.run("sft", runs, place.name, resume="auto")
    assert numbers(place)["perplexity_before"] == numbers(whole)["perplexity_before"]
    assert numbers(place)["perplexity_before"] != pytest.approx(numbers(whole)["perplexity"])
