"""Tests of runs sharded by FSDP2: they match a run of one process and resume with any number of processes.

Accelerate supports FSDP2 on GPUs only, so the test program calls `fully_shard` itself, over gloo.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import forks
from programs import train_ppo_fsdp as program
from programs.small_runs import largest_difference
from safetensors.torch import load_file

Make = Callable[..., Any]
CASES = ["full", "lora", "upper"]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_policy: Make, make_reward_model: Make, tokenizer: Any
) -> Path:
    """Return the folder with the runs of two processes, which hold half of the weights each."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, module in (
        ("policy", make_policy(0, initializer_range=0.1)),
        ("reward_model", make_reward_model(3, initializer_range=0.2)),
    ):
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    result = forks.launch(2, lambda: program.main(folder))
    assert result.returncode == 0, result.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def single_process_run(folder: Path) -> Callable[[str], Any]:
    """Return a function (case) that returns the trainer of the same run in one process, after it has saved."""
    trainers: dict[str, Any] = {}

    def trained(case: str) -> Any:
        if case not in trainers:
            trainers[case] = program.make_trainer(folder, f"{case} single", case)
            trainers[case].train()
            trainers[case].save_model()
        return trainers[case]

    return trained


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    paths = [*folder.glob("*.safetensors"), *folder.glob("value_model/*.safetensors")]
    return {f"{path.relative_to(folder)}:{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def test_each_fsdp_process_holds_half_of_weights_and_moments(folder: Path) -> None:
    """Up to rounding: a layer may have an odd size."""
    for share in json.loads((folder / "shares.json").read_text()).values():
        assert share["layers"] == 3
        assert share["weights"] == pytest.approx(0.5, abs=0.02) and share["moments"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("case", CASES)
def test_fsdp_run_matches_one_process(folder: Path, single_process_run: Callable[[str], Any], case: str) -> None:
    """Equal policy, value and log, with answers of unequal length and different numbers of pieces."""
    single_log = single_process_run(case).state.log_history
    single, sharded = weights_in(folder / f"{case} single"), weights_in(folder / f"{case} sharded")
    assert largest_difference(single, sharded) < 2e-5
    log = json.loads((folder / f"{case} sharded" / "log.json").read_text())
    assert [entry["step"] for entry in log] == [entry["step"] for entry in single_log]
    for single_metrics, metrics in zip(single_log, log, strict=True):
        expected = {
            name: value
            for name, value in single_metrics.items()
            if not name.startswith(("time/", "train_")) and name != "eps"
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_fsdp_run_resumes_with_any_number_of_processes(
    folder: Path, single_process_run: Callable[[str], Any], case: str
) -> None:
    """In the middle of an update: with two processes bit for bit, and with one process and unsharded weights."""
    assert largest_difference(weights_in(folder / f"{case} sharded"), weights_in(folder / f"{case} resumed")) == 0
    single_process_run(case)
    shutil.copytree(folder / f"{case} sharded" / "checkpoint-3", folder / f"{case} gathered" / "checkpoint-3")
    trainer = program.make_trainer(folder, f"{case} gathered", case)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    assert largest_difference(weights_in(folder / f"{case} single"), weights_in(folder / f"{case} gathered")) < 2e-5
