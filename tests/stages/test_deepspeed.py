"""DeepSpeed ZeRO-2 and ZeRO-3 on CPU processes, against one process. Slow: it compiles its communication when first run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from programs import small_runs
from programs.small_runs import LORA, largest_difference

from rlhf_recipes.folders.checkpoints import write_checksums

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(str(small_runs.__file__))
FOUR: dict[str, Any] = LORA | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "pretrain": {}, "sft": {}, "reward": {}, "ppo": {}, "sft, LoRA": LORA, "reward, LoRA": LORA, "ppo, LoRA": LORA,
    "sft, 4 bits": FOUR, "reward, 4 bits": FOUR, "ppo, 4 bits": FOUR,
}  # fmt: skip
TOLERANCE = 2e-5
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra; not installed"),
]


def launched(runs: Path, stage: int, processes: int, jobs: list[dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    """Launch as users do: with the file of accelerate_configs/, set to CPUs."""
    settings = yaml.safe_load((ROOT / f"accelerate_configs/deepspeed_zero{stage}.yaml").read_text())
    path, config = runs / "jobs.json", runs / f"zero{stage}.yaml"
    path.write_text(json.dumps(jobs))
    config.write_text(yaml.safe_dump(settings | {"use_cpu": True, "num_processes": processes}))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return subprocess.run(
        [*command, str(PROGRAM), str(runs), str(path)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_alone(runs: Path) -> Callable[[str], Path]:
    def made(kind: str) -> Path:
        out = runs / f"{kind} alone"
        return out if out.exists() else small_runs.run(kind.partition(",")[0], runs, out.name, **KINDS[kind])

    return made


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_runs_train_like_one_process_and_resume(
    stage: int, processes: int, runs: Path, run_alone: Callable[[str], Path]
) -> None:
    """Compares weights and metrics, then the weights of runs that resume from a checkpoint."""
    name = f"by {processes} zero {stage}"
    jobs = [
        {"stage": kind.partition(",")[0], "out": f"{kind} {name}", "save_total_limit": 9, **KINDS[kind]}
        for kind in KINDS
    ]
    done = launched(runs, stage, processes, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        one, many = run_alone(kind), runs / f"{kind} {name}"
        assert largest_difference(small_runs.weights_in(one), small_runs.weights_in(many)) < TOLERANCE
        expected, found = (json.loads((folder / "metrics.json").read_text()) for folder in (one, many))
        for key in {"perplexity", "reward_accuracy", "margin", "score"} & set(expected):
            assert found[key] == pytest.approx(expected[key], rel=1e-4)
        shutil.copytree(many / "checkpoint-4", runs / f"{kind} {name} resumed" / "checkpoint-4")
    resumed = [job | {"out": f"{job['out']} resumed", "resume": "auto"} for job in jobs]
    done = launched(runs, stage, processes, resumed)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        weights = small_runs.weights_in(runs / f"{kind} {name} resumed")
        assert largest_difference(small_runs.weights_in(run_alone(kind)), weights) < TOLERANCE


def test_unsupported_ppo_options_are_refused_before_anything_is_written(runs: Path) -> None:
    done = launched(runs, 2, 2, [{"stage": "ppo", "out": "ppo zero", "value_warmup_updates": 1}])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert "value_warmup_updates" in lines[0] and "accelerate_configs/fsdp2.yaml" in lines[0]
    assert not (runs / "ppo zero").exists()


def test_resuming_with_another_number_of_processes_is_refused(runs: Path) -> None:
    """ZeRO shards a checkpoint for the number of processes that saved it."""
    assert launched(runs, 2, 2, [{"stage": "sft", "out": "saved by two"}]).returncode == 0
    shutil.copytree(runs / "saved by two" / "checkpoint-4", runs / "resumed by one" / "checkpoint-4")
    done = launched(runs, 2, 1, [{"stage": "sft", "out": "resumed by one", "resume": "auto"}])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "was saved by 2 processes" in lines[0]


class RunsWhenUnpickled:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_with_code_is_refused(stage: int, runs: Path) -> None:
    """DeepSpeed alone would unpickle it."""
    name = f"with code {stage}"
    assert launched(runs, stage, 1, [{"stage": "sft", "out": name}]).returncode == 0
    checkpoint = runs / f"{name} resumed" / "checkpoint-4"
    shutil.copytree(runs / name / "checkpoint-4", checkpoint)
    for number, path in enumerate(sorted(checkpoint.rglob("*.pt"))):
        if path.parent != checkpoint:
            state = torch.load(path, weights_only=False)
            torch.save(state | {"more": RunsWhenUnpickled(runs / f"ran {stage} {number}")}, path)
    write_checksums(checkpoint)
    done = launched(runs, stage, 1, [{"stage": "sft", "out": f"{name} resumed", "resume": "auto"}])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "holds a pickle that would run code (posix.mkdir)" in lines[0]
    assert not list(runs.glob(f"ran {stage}*"))
