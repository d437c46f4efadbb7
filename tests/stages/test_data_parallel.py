"""Each stage on two and on four processes joined by gloo, as users launch it, against one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from programs import small_runs
from programs.small_runs import LORA, STAGES, farthest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.folders.checkpoints import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(str(small_runs.__file__))
KINDS: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES} | {
    f"{stage}, LoRA": LORA for stage in STAGES if stage != "pretrain"
}  # fmt: skip
TOLERANCE = 2e-5  # of any weight, after six optimizer steps (ppo: ten) that each move it by about 1e-3
# Trainer counts an epoch in micro-batches, and TRL takes the mean of these over them.
OF_MICRO_BATCHES = {"epoch", "mean_token_accuracy", "entropy", "min_reward", "max_reward"}
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def launch(world: Path) -> Launch:
    """(processes, jobs) -> the launch that ran them, ended with code 0 unless `code` says otherwise."""

    def start(processes: int, jobs: list[dict[str, Any]], code: int = 0) -> "subprocess.CompletedProcess[str]":
        told = world / f"jobs-{processes}-{len(list(world.glob('jobs-*')))}.json"
        told.write_text(json.dumps(jobs))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(PROGRAM), str(world), str(told)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert (done.returncode != 0) == (code != 0), done.stderr[-3000:]
        return done

    return start


def stage_of(kind: str) -> str:
    return kind.partition(",")[0]


@pytest.fixture(scope="module")
def several(launch: Launch, world: Path) -> Callable[[str, int], Path]:
    """(kind, processes) -> the folder of that run; every kind is run in one launch."""

    def made(kind: str, processes: int) -> Path:
        if not (world / f"{kind} by {processes}").exists():
            jobs = [{"stage": stage_of(each), "out": f"{each} by {processes}", **KINDS[each]} for each in KINDS]
            launch(processes, [job | {"save_total_limit": 9} for job in jobs])
        return world / f"{kind} by {processes}"

    return made


@pytest.fixture(scope="module")
def identity(world: Path) -> Callable[[str], Path]:
    """(kind) -> the folder of the run by this process alone."""

    def made(kind: str) -> Path:
        out = world / f"{kind} by 1"
        return out if out.exists() else small_runs.run(stage_of(kind), world, out.name, **KINDS[kind])

    return made


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_so_many_processes_end_as_one_does(
    kind: str, processes: int, several: Callable[[str, int], Path], alone: Callable[[str], Path], world: Path
) -> None:
    """Weights and what was logged; and the run did learn something."""
    one, many = identity(kind), several(kind, processes)
    start = small_runs.weights_in(world / "model")
    learnt = small_runs.weights_in(one)
    moved = {name: learnt[name] for name in learnt if name in start or "lora_B" in name}
    assert farthest(moved, {name: start.get(name, torch.zeros_like(moved[name])) for name in moved}) > 1e-3
    assert farthest(learnt, small_runs.weights_in(many)) < TOLERANCE
    expected, found = (json.loads((each / "trainer_state.json").read_text())["log_history"] for each in (one, many))
    assert [entry["step"] for entry in expected] == [entry["step"] for entry in found]
    for mine, theirs in zip(expected, found, strict=True):
        same = {
            name: value
            for name, value in small_runs.timeless(mine).items()
            if name.removeprefix("eval_") not in OF_MICRO_BATCHES
        }
        assert {name: theirs[name] for name in same} == pytest.approx(same, rel=2e-3, abs=1e-4)


def test_the_best_checkpoint_is_taken_by_every_process(launch: Launch, world: Path) -> None:
    """Not by the first alone, which saved it. The best are those that have learnt least: early ones."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    kinds: dict[str, dict[str, Any]] = {
        "sft": best | {"metric_for_best_model": "eval_loss", "greater_is_better": True},
        "ppo": best | {"metric_for_best_model": "eval_objective/kl", "greater_is_better": False},
    }
    launch(2, [{"stage": stage, "out": f"{stage} best by 2", **kinds[stage]} for stage in kinds])
    for stage, asked in kinds.items():
        one, two = small_runs.run(stage, world, f"{stage} best by 1", **asked), world / f"{stage} best by 2"
        state = json.loads((two / "trainer_state.json").read_text())
        assert state["best_global_step"] < state["global_step"]
        saved = small_runs.weights_in(two / f"checkpoint-{state['best_global_step']}")
        chosen = {name: each for name, each in saved.items() if not name.startswith("rollout_")}
        assert farthest(small_runs.weights_in(two), chosen) == 0
        assert farthest(small_runs.weights_in(one), small_runs.weights_in(two)) < TOLERANCE
        told = [json.loads((each / "metrics.json").read_text()) for each in (one, two)]
        measured = "eval_loss" if stage == "sft" else "score"  # at the end, by each process on its share
        assert told[1][measured] == pytest.approx(told[0][measured], rel=1e-4)


def points(stage: str) -> tuple[str, str]:
    """Where runs are taken up; for ppo, whose updates take four steps, also in the middle of one."""
    return ("checkpoint-4", "checkpoint-6") if stage == "ppo" else ("checkpoint-2", "checkpoint-4")


@pytest.fixture(scope="module")
def taken_up(launch: Launch, several: Callable[[str, int], Path], world: Path) -> None:
    """What two processes began and one goes on with, and what one began and two go on with."""
    jobs = []
    for stage in STAGES:
        small_runs.run(stage, world, f"{stage} begun", save_total_limit=9)
        for point in points(stage):
            fewer, more = f"{stage} fewer {point}", f"{stage} more {point}"
            shutil.copytree(several(stage, 2) / point, world / fewer / point)
            shutil.copytree(world / f"{stage} begun" / point, world / more / point)
            small_runs.run(stage, world, fewer, resume="auto")
            jobs.append({"stage": stage, "out": more, "resume": "auto"})
    launch(2, jobs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", ["fewer", "more"])
def test_a_run_goes_on_with_another_number_of_processes(
    stage: str, way: str, taken_up: None, identity: Callable[[str], Path], world: Path
) -> None:
    whole = small_runs.weights_in(identity(stage))
    for point in points(stage):
        assert farthest(whole, small_runs.weights_in(world / f"{stage} {way} {point}")) < TOLERANCE


@pytest.mark.fault("one of two processes dies", stage="sft")
@pytest.mark.parametrize(
    ("how", "words"), [pytest.param("error", "this process has had enough", marks=pytest.mark.slow), ("9", "SIGKILL")]
)
def test_a_process_that_dies_ends_the_run_which_then_goes_on(
    how: str, words: str, alone: Callable[[str], Path], launch: Launch, world: Path
) -> None:
    out = f"dead of {how}"
    done = launch(2, [{"stage": "sft", "out": out, "dies": [3, how]}], code=1)
    assert words in done.stderr + done.stdout
    assert [path.name for path in list_checkpoints(world / out)] == ["checkpoint-2"]
    launch(2, [{"stage": "sft", "out": out, "resume": "auto"}])
    assert farthest(small_runs.weights_in(identity("sft")), small_runs.weights_in(world / out)) < TOLERANCE


@pytest.mark.fault("one of two processes is told to end (SIGTERM)", stage="ppo")
def test_one_process_that_is_told_to_end_ends_all_at_the_same_step(
    alone: Callable[[str], Path], launch: Launch, world: Path
) -> None:
    done = launch(2, [{"stage": "ppo", "out": "told", "dies": [5, str(int(signal.SIGTERM))]}], code=1)
    assert "stopped by SIGTERM; saved at step 6" in done.stderr
    assert list_checkpoints(world / "told")[0].name == "checkpoint-6"
    small_runs.run("ppo", world, "told", resume="auto")
    assert farthest(small_runs.weights_in(identity("ppo")), small_runs.weights_in(world / "told")) < TOLERANCE


def test_two_machines_end_as_one_process_does(alone: Callable[[str], Path], world: Path) -> None:
    """As docs/scaling.md has them launched, of one process each; here they are one machine, and meet on loopback."""
    asked = yaml.safe_load((ROOT / "accelerate_configs/several_nodes.yaml").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, jobs = world / "several_nodes.yaml", world / "jobs of several nodes.json"
    config.write_text(
        yaml.safe_dump(asked | {"use_cpu": True, "num_processes": 2, "main_process_port": port}),
    )
    jobs.write_text(json.dumps([{"stage": stage, "out": f"{stage} on two machines"} for stage in ("sft", "ppo")]))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    said = [world / f"machine {rank} said" for rank in (0, 1)]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", str(PROGRAM), str(world), str(jobs)],
            env=environment, stdout=subprocess.DEVNULL, stderr=path.open("w"),
        )
        for rank, path in enumerate(said)
    ]  # fmt: skip
    try:
        codes = [machine.wait(timeout=240) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()  # which a launcher hands on
    assert codes == [0, 0], "\n".join(path.read_text()[-2000:] for path in said)
    for stage in ("sft", "ppo"):
        found = small_runs.weights_in(world / f"{stage} on two machines")
        assert farthest(small_runs.weights_in(identity(stage)), found) < TOLERANCE


def test_a_batch_that_does_not_divide_is_one_line(launch: Launch, world: Path) -> None:
    done = launch(2, [{"stage": "sft", "out": "odd", "global_batch_size": 7}], code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: global_batch_size 7 does not divide among 2 processes; ")
    assert not (world / "odd").exists()


FALLBACKS = {
    "cpu flag": (["--cpu", "--num_processes", "2"], "requests several processes but started one"),
    "MULTI_CPU": ({"distributed_type": "MULTI_CPU", "use_cpu": True}, "requests several processes but started one"),
    "FSDP": (
        {"distributed_type": "FSDP", "use_cpu": True, "fsdp_config": {"fsdp_version": 2}},
        "requests FSDP, but on a CPU Accelerate would run plain data parallelism",
    ),
}


@pytest.mark.parametrize("kind", ["cpu flag", pytest.param("MULTI_CPU", marks=pytest.mark.slow), "FSDP"])
def test_a_launch_that_would_quietly_be_less_is_refused(kind: str, world: Path, tmp_path: Path) -> None:
    asked, words = FALLBACKS[kind]
    if isinstance(asked, dict):
        config = tmp_path / "launch.yaml"
        config.write_text(
            json.dumps({"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2} | asked)
        )
        asked = ["--config_file", str(config)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *asked]
    command += ["-m", "rlhf_recipes", "sft", *small_runs.flags("sft", world, f"fallen {kind}")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and words in lines[0] and "distributed_type: MULTI_GPU" in lines[0]
    assert not (world / f"fallen {kind}").exists()


def test_processes_that_would_each_train_by_themselves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from rlhf_recipes.system.launch import check_launch

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes, but each would train alone"):
        check_launch(SimpleNamespace(use_cpu=False, world_size=1))
    check_launch(SimpleNamespace(use_cpu=False, world_size=2))
