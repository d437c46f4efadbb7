"""Points 7 and 20 on weights that FSDP2 has cut apart: the same run as one process makes, and its states whole again.

Accelerate reaches FSDP2 on GPUs alone, so `fully_shard` is applied natively here, over gloo.
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
from programs.small_runs import farthest
from safetensors.torch import load_file

Make = Callable[..., Any]
CASES = ["full", "lora", "upper"]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_policy: Make, make_reward_model: Make, tokenizer: Any
) -> Path:
    """The folder with the runs of two processes, each with a half of the weights."""
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
def run_alone(folder: Path) -> Callable[[str], Any]:
    """(case) -> the trainer of the same run by one process, which has saved its model."""
    trainers: dict[str, Any] = {}

    def trained(case: str) -> Any:
        if case not in trainers:
            trainers[case] = program.made(folder, f"{case} alone", case)
            trainers[case].train()
            trainers[case].save_model()
        return trainers[case]

    return trained


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    paths = [*folder.glob("*.safetensors"), *folder.glob("value_model/*.safetensors")]
    return {f"{path.relative_to(folder)}:{name}": each for path in paths for name, each in load_file(path).items()}


def test_each_fsdp_process_holds_half_of_weights_and_moments(folder: Path) -> None:
    """Of weights and of Adam's moments; a layer may be of an odd size."""
    for share in json.loads((folder / "shares.json").read_text()).values():
        assert share["layers"] == 3
        assert share["weights"] == pytest.approx(0.5, abs=0.02) and share["moments"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("case", CASES)
def test_fsdp_run_matches_one_process(folder: Path, run_alone: Callable[[str], Any], case: str) -> None:
    """Policy and value, with answers of unequal length and pieces of unequal number, and what was logged."""
    expected = run_alone(case).state.log_history
    one, two = weights_in(folder / f"{case} alone"), weights_in(folder / f"{case} sharded")
    assert farthest(one, two) < 2e-5
    found = json.loads((folder / f"{case} sharded" / "log.json").read_text())
    assert [entry["step"] for entry in expected] == [entry["step"] for entry in found]
    for mine, theirs in zip(expected, found, strict=True):
        same = {
            name: value for name, value in mine.items() if not name.startswith(("time/", "train_")) and name != "eps"
        }
        assert {name: theirs[name] for name in same} == pytest.approx(same, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_fsdp_run_resumes_with_any_number_of_processes(
    folder: Path, run_alone: Callable[[str], Any], case: str
) -> None:
    """In the middle of an update: by as many processes bit for bit, and by one with whole weights."""
    assert farthest(weights_in(folder / f"{case} sharded"), weights_in(folder / f"{case} resumed")) == 0
    run_alone(case)
    shutil.copytree(folder / f"{case} sharded" / "checkpoint-3", folder / f"{case} gathered" / "checkpoint-3")
    trainer = program.made(folder, f"{case} gathered", case)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    assert farthest(weights_in(folder / f"{case} alone"), weights_in(folder / f"{case} gathered")) < 2e-5
