"""Each stage on two and on four processes joined by gloo, against one process; and how launches end."""

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
from accelerate.commands import launch as accelerate
from programs import forks, small_runs
from programs.small_runs import LORA, STAGES, largest_difference

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.folders.checkpoints import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(str(small_runs.__file__))
KINDS: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES} | {
    f"{stage}, LoRA": LORA for stage in STAGES if stage != "pretrain"
}  # fmt: skip
TOLERANCE = 2e-5  # of any weight, after six optimizer steps (ppo: ten) that each move it by about 1e-3
# Trainer counts an epoch in micro-batches, and TRL averages these metrics over them.
MICRO_BATCH_METRICS = {"epoch", "mean_token_accuracy", "entropy", "min_reward", "max_reward"}
Launch = Callable[..., forks.Result]


@pytest.fixture(scope="module")
def launch(runs: Path) -> Launch:
    """(processes, jobs) -> the result of running them, which ended with code 0 or, if `code` is another, failed."""

    def start(processes: int, jobs: list[dict[str, Any]], code: int = 0) -> forks.Result:
        result = forks.launch(processes, lambda: small_runs.run_jobs(runs, jobs))
        assert (result.returncode != 0) == (code != 0), result.stderr[-3000:]
        return result

    return start


def torchrun(runs: Path, jobs: list[dict[str, Any]]) -> forks.Result:
    """Run the jobs on two processes that torchrun starts."""
    path = runs / f"jobs of {jobs[0]['out']}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(runs), str(path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def stage_of(kind: str) -> str:
    return kind.partition(",")[0]


@pytest.fixture(scope="module")
def run_by(launch: Launch, runs: Path) -> Callable[[str, int], Path]:
    """(kind, processes) -> the folder of that run; every kind is run in one launch."""

    def made(kind: str, processes: int) -> Path:
        if not (runs / f"{kind} by {processes}").exists():
            jobs = [{"stage": stage_of(each), "out": f"{each} by {processes}", **KINDS[each]} for each in KINDS]
            launch(processes, [job | {"save_total_limit": 9} for job in jobs])
        return runs / f"{kind} by {processes}"

    return made


@pytest.fixture(scope="module")
def run_alone(runs: Path) -> Callable[[str], Path]:
    """(kind) -> the folder of the run by this process alone."""

    def made(kind: str) -> Path:
        out = runs / f"{kind} by 1"
        return out if out.exists() else small_runs.run(stage_of(kind), runs, out.name, **KINDS[kind])

    return made


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_train_like_one(
    kind: str, processes: int, run_by: Callable[[str, int], Path], run_alone: Callable[[str], Path], runs: Path
) -> None:
    """Compares weights and logs; and the weights changed."""
    one, many = run_alone(kind), run_by(kind, processes)
    start = small_runs.weights_in(runs / "model")
    trained = small_runs.weights_in(one)
    moved = {name: trained[name] for name in trained if name in start or "lora_B" in name}
    assert largest_difference(moved, {name: start.get(name, torch.zeros_like(moved[name])) for name in moved}) > 1e-3
    assert largest_difference(trained, small_runs.weights_in(many)) < TOLERANCE
    expected, found = (json.loads((each / "trainer_state.json").read_text())["log_history"] for each in (one, many))
    assert [entry["step"] for entry in expected] == [entry["step"] for entry in found]
    for mine, theirs in zip(expected, found, strict=True):
        same = {
            name: value
            for name, value in small_runs.without_times(mine).items()
            if name.removeprefix("eval_") not in MICRO_BATCH_METRICS
        }
        assert {name: theirs[name] for name in same} == pytest.approx(same, rel=2e-3, abs=1e-4)


def test_every_process_loads_the_best_checkpoint(launch: Launch, runs: Path) -> None:
    """Not only rank 0, which saved it. The metric prefers the checkpoint that is trained least: an early one."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    options: dict[str, dict[str, Any]] = {
        "sft": best | {"metric_for_best_model": "eval_loss", "greater_is_better": True},
        "ppo": best | {"metric_for_best_model": "eval_objective/kl", "greater_is_better": False},
    }
    launch(2, [{"stage": stage, "out": f"{stage} best by 2", **options[stage]} for stage in options])
    for stage, changes in options.items():
        one, two = small_runs.run(stage, runs, f"{stage} best by 1", **changes), runs / f"{stage} best by 2"
        state = json.loads((two / "trainer_state.json").read_text())
        assert state["best_global_step"] < state["global_step"]
        saved = small_runs.weights_in(two / f"checkpoint-{state['best_global_step']}")
        chosen = {name: each for name, each in saved.items() if not name.startswith("rollout_")}
        assert largest_difference(small_runs.weights_in(two), chosen) == 0
        assert largest_difference(small_runs.weights_in(one), small_runs.weights_in(two)) < TOLERANCE
        expected, found = (json.loads((each / "metrics.json").read_text()) for each in (one, two))
        metric = "eval_loss" if stage == "sft" else "score"  # at the end, by each process on its share
        assert found[metric] == pytest.approx(expected[metric], rel=1e-4)


def resumed_checkpoints(stage: str) -> tuple[str, str]:
    """Return the checkpoints to resume from; for ppo, whose updates take four steps, one is within an update."""
    return ("checkpoint-4", "checkpoint-6") if stage == "ppo" else ("checkpoint-2", "checkpoint-4")


@pytest.fixture(scope="module")
def resumed(launch: Launch, run_by: Callable[[str, int], Path], runs: Path) -> None:
    """Runs begun by two processes and resumed by one, and begun by one and resumed by two."""
    jobs = []
    for stage in STAGES:
        small_runs.run(stage, runs, f"{stage} begun", save_total_limit=9)
        for checkpoint in resumed_checkpoints(stage):
            fewer, more = f"{stage} fewer {checkpoint}", f"{stage} more {checkpoint}"
            shutil.copytree(run_by(stage, 2) / checkpoint, runs / fewer / checkpoint)
            shutil.copytree(runs / f"{stage} begun" / checkpoint, runs / more / checkpoint)
            small_runs.run(stage, runs, fewer, resume="auto")
            jobs.append({"stage": stage, "out": more, "resume": "auto"})
    launch(2, jobs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("processes", ["fewer", "more"])
def test_a_run_resumes_with_another_number_of_processes(
    stage: str, processes: str, resumed: None, run_alone: Callable[[str], Path], runs: Path
) -> None:
    uninterrupted = small_runs.weights_in(run_alone(stage))
    for checkpoint in resumed_checkpoints(stage):
        assert (
            largest_difference(uninterrupted, small_runs.weights_in(runs / f"{stage} {processes} {checkpoint}"))
            < TOLERANCE
        )


@pytest.mark.fault("one of two processes dies", stage="sft")
@pytest.mark.parametrize(
    ("how", "words"),
    [pytest.param("error", "this process fails on purpose", marks=pytest.mark.slow), ("9", "SIGKILL")],
)
def test_a_process_that_dies_ends_the_run_which_then_resumes(
    how: str, words: str, run_alone: Callable[[str], Path], launch: Launch, runs: Path
) -> None:
    out = f"dead of {how}"
    result = torchrun(runs, [{"stage": "sft", "out": out, "dies": [3, how]}])
    assert result.returncode != 0 and words in result.stderr + result.stdout
    assert [path.name for path in list_checkpoints(runs / out)] == ["checkpoint-2"]
    launch(2, [{"stage": "sft", "out": out, "resume": "auto"}])
    assert largest_difference(small_runs.weights_in(run_alone("sft")), small_runs.weights_in(runs / out)) < TOLERANCE


@pytest.mark.fault("one of two processes gets SIGTERM", stage="ppo")
def test_sigterm_to_one_process_stops_all_at_the_same_step(
    run_alone: Callable[[str], Path], launch: Launch, runs: Path
) -> None:
    done = launch(2, [{"stage": "ppo", "out": "stopped", "dies": [5, str(int(signal.SIGTERM))]}], code=1)
    assert "stopped by SIGTERM; saved at step 6" in done.stderr
    assert list_checkpoints(runs / "stopped")[0].name == "checkpoint-6"
    small_runs.run("ppo", runs, "stopped", resume="auto")
    assert (
        largest_difference(small_runs.weights_in(run_alone("ppo")), small_runs.weights_in(runs / "stopped"))
        < TOLERANCE
    )


@pytest.mark.slow
def test_two_machines_train_like_one_process(run_alone: Callable[[str], Path], runs: Path) -> None:
    """Launched as docs/scaling.md says, with one process each; here both are this machine, joined on loopback."""
    settings = yaml.safe_load((ROOT / "accelerate_configs/several_nodes.yaml").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, jobs = runs / "several_nodes.yaml", runs / "jobs of several nodes.json"
    config.write_text(
        yaml.safe_dump(settings | {"use_cpu": True, "num_processes": 2, "main_process_port": port}),
    )
    jobs.write_text(json.dumps([{"stage": stage, "out": f"{stage} on two machines"} for stage in ("sft", "ppo")]))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    errors = [runs / f"machine {rank}.err" for rank in (0, 1)]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", str(PROGRAM), str(runs), str(jobs)],
            env=environment, stdout=subprocess.DEVNULL, stderr=path.open("w"),
        )
        for rank, path in enumerate(errors)
    ]  # fmt: skip
    try:
        codes = [machine.wait(timeout=240) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()  # a launcher passes it on
    assert codes == [0, 0], "\n".join(path.read_text()[-2000:] for path in errors)
    for stage in ("sft", "ppo"):
        weights = small_runs.weights_in(runs / f"{stage} on two machines")
        assert largest_difference(small_runs.weights_in(run_alone(stage)), weights) < TOLERANCE


def test_a_batch_size_that_does_not_divide_by_processes_is_refused(launch: Launch, runs: Path) -> None:
    done = launch(2, [{"stage": "sft", "out": "odd", "global_batch_size": 7}], code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: global_batch_size 7 does not divide among 2 processes; ")
    assert not (runs / "odd").exists()


FALLBACKS = {
    "cpu flag": (["--cpu", "--num_processes", "2"], "requests several processes but started one"),
    "MULTI_CPU": ({"distributed_type": "MULTI_CPU", "use_cpu": True}, "requests several processes but started one"),
    "FSDP": (
        {"distributed_type": "FSDP", "use_cpu": True, "fsdp_config": {"fsdp_version": 2}},
        "requests FSDP, but on a CPU Accelerate would run plain data parallelism",
    ),
}


def launch_words(kind: str, folder: Path) -> tuple[list[str], str]:
    """Return the words of `accelerate launch` for that setup, and what the error must say."""
    setup, message = FALLBACKS[kind]
    if isinstance(setup, list):
        return setup, message
    config = folder / "launch.yaml"
    shared = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2}
    config.write_text(json.dumps(shared | setup))
    return ["--config_file", str(config)], message


def check_refusal(result: forks.Result, message: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(lines) == 1 and message in lines[0], result.stderr[-3000:]
    assert "distributed_type: MULTI_GPU" in lines[0]


@pytest.mark.parametrize("kind", FALLBACKS)
def test_a_launch_that_falls_back_to_fewer_processes_is_refused(
    kind: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs in forks, with the environment that Accelerate's launcher sets for its processes."""
    words, message = launch_words(kind, tmp_path)
    launches: list[tuple[int, dict[str, str]]] = []
    one, several = accelerate.prepare_simple_launcher_cmd_env, accelerate.prepare_multi_gpu_env
    monkeypatch.setattr(accelerate, "simple_launcher", lambda args: launches.append((1, one(args)[1])))
    monkeypatch.setattr(accelerate, "multi_gpu_launcher", lambda args: launches.append((2, several(args))))
    accelerate.launch_command(accelerate.launch_command_parser().parse_args([*words, "-m", "rlhf_recipes"]))
    [(processes, environment)] = launches
    jobs = [{"stage": "sft", "out": f"refused {kind}"}]
    if processes == 1:
        result = forks.run_forked(lambda: small_runs.run_jobs(runs, jobs), environment)
    else:
        result = forks.launch(processes, lambda: small_runs.run_jobs(runs, jobs), environment)
    check_refusal(result, message)
    assert not (runs / f"refused {kind}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FALLBACKS)
def test_accelerate_launch_that_falls_back_to_fewer_processes_is_refused(
    kind: str, runs: Path, tmp_path: Path
) -> None:
    words, message = launch_words(kind, tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *words]
    command += ["-m", "rlhf_recipes", "sft", *small_runs.flags("sft", runs, f"fallen {kind}")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    check_refusal(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300), message)
    assert not (runs / f"fallen {kind}").exists()


def test_processes_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from rlhf_recipes.system.launch import check_launch

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes, but each would train alone"):
        check_launch(SimpleNamespace(use_cpu=False, world_size=1))
    check_launch(SimpleNamespace(use_cpu=False, world_size=2))
