"""Runs of dpo and rloo that are cut off at any step and resumed end with the same bits as the run that was not."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from programs.small_runs import identical, weights_in, without_times
from safetensors.torch import load_file

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError

STEPS = 10
REWARD = "def letters(completions, **columns): return [float(len(text) % 5) for text in completions]\n"
KINDS: dict[str, dict[str, Any]] = {
    "dpo, synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "rloo, synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 3, "beta": 0.5},
    # An epoch has 8 steps, 4 of them on one batch of answers.
    "rloo, answers used several times": {"num_iterations": 2, "steps_per_generation": 2},
}
CUTS = [
    (kind, cut)
    for kind in KINDS
    for cut in (range(1, STEPS) if "answers" in kind else (1, 4, 8) if "rloo" in kind else (3, 6))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model: Any, make_tokenizer: Any) -> Path:
    place = tmp_path_factory.mktemp("resume")
    make_model(initializer_range=0.2).save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    rows = [{"prompt": "ab" * (index + 1), "chosen": f" {index}", "rejected": " no" * index} for index in range(4)]
    (place / "rows").mkdir()
    (place / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "resume_rewards.py").write_text(REWARD)
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Callable[..., Path]:
    """(kind, name, **changes) -> the folder that the run left."""

    def start(kind: str, name: str, **changes: Any) -> Path:
        stage = kind.partition(",")[0]
        run_stage = getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
        values = {"model_name_or_path": folder / "model", "dataset_name": folder / "rows", "output_dir": folder / name}
        values |= {"report_to": "none", "disable_tqdm": True, "max_steps": STEPS, "save_steps": 1, "logging_steps": 2}
        values |= {"save_total_limit": 99, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "seed": 5}
        if stage == "rloo":
            values |= {"reward": "resume_rewards:letters", "max_completion_length": 5}
        else:
            values["per_device_train_batch_size"] = 2
        values |= KINDS[kind] | changes
        words = [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]
        types = [hint for key, hint in get_type_hints(run_stage).items() if key != "return"]
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(folder))
            return Path(run_stage(*parse_arguments(*types, argv=words)))

    return start


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, run: Callable[..., Path]) -> Callable[[str], Path]:
    def made(kind: str) -> Path:
        return folder / kind if (folder / kind).exists() else run(kind, kind)

    return made


def log_of(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in without_times(entry).items() if name != "step_time"} for entry in history]


@pytest.mark.parametrize(("kind", "cut"), CUTS)
def test_a_resumed_run_matches_the_uninterrupted_run(
    kind: str, cut: int, folder: Path, run: Callable[..., Path], uninterrupted: Callable[[str], Path]
) -> None:
    whole = uninterrupted(kind)
    place = folder / f"{kind} cut at {cut}"
    shutil.copytree(whole / f"checkpoint-{cut}", place / f"checkpoint-{cut}")
    run(kind, place.name, resume="auto")
    assert identical(weights_in(place), weights_in(whole))
    assert log_of(place) == log_of(whole)


def test_checkpoints_hold_the_reference_and_the_answers_with_checksums(uninterrupted: Callable[[str], Path]) -> None:
    synced, sampled = uninterrupted("dpo, synced reference"), uninterrupted("rloo, answers used several times")
    reference = load_file(synced / "checkpoint-2" / "reference.safetensors")
    policy = load_file(synced / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(reference[name], policy[name]) for name in reference)
    kept = [(sampled / f"checkpoint-{step}" / "answers_0.safetensors").is_file() for step in (1, 2, 3, 4, 5)]
    assert kept == [True, True, True, False, True], "after step 4 answers are sampled again"
    sums = (sampled / "checkpoint-1" / "SHA256SUMS").read_text()
    assert (
        "answers_0.safetensors" in sums
        and "reference.safetensors" in (synced / "checkpoint-2" / "SHA256SUMS").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_peft": True}, "sync_ref_model needs a separate reference model"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs needs a fixed reference"),
    ],
)
def test_a_synced_reference_that_cannot_be_is_refused(
    run: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run("dpo, synced reference", "refused", **changes)


def test_rloo_without_a_penalty_has_no_reference_to_sync(run: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="no effect with beta 0"):
        run("rloo, synced reference", "refused", beta=0.0)
