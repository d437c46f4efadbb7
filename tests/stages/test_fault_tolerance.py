"""Runs that are killed, stopped, out of disk or memory, or have a NaN or a damaged checkpoint lose nothing that was saved.

After `--resume auto` each ends bit for bit like the uninterrupted run.
"""

import ctypes
import fcntl
import itertools
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import forks, small_runs
from programs.small_runs import STAGES
from tqdm import tqdm
from transformers import Trainer

from rlhf_recipes.core.errors import UserError, one_line_errors
from rlhf_recipes.folders.checkpoints import CHECKSUMS_FILE, find_damage, list_checkpoints, write_checksums
from rlhf_recipes.folders.lock import LOCK_FILE, folder_lock, require_unlocked
from rlhf_recipes.training import sigterm
from rlhf_recipes.training.finite import local_shard
from rlhf_recipes.training.trainer import SafeTrainer

SLOW = pytest.mark.slow
CASES: dict[str, tuple[str, dict[str, Any]]] = {stage: (stage, {}) for stage in STAGES} | {
    "pretrain, dropout": ("pretrain", {"dropout": 0.2}),
    "pretrain, streamed": ("pretrain", {"dataset_streaming": True}),
    "sft, LoRA": ("sft", {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1}),
    "sft, packed": ("sft", {"packing": True, "max_length": 32}),
}


SECONDS: dict[str, float] = {}  # of the uninterrupted run of each case


def run_as_recipe(act: Callable[[], Any], folder: Path) -> tuple[int, str]:
    """Run in a fork as a recipe does; return its exit code (minus the signal that killed it) and its stderr.

    stdout is not checkpoints: the limit that some tests set on the size of files would hold for it.
    """
    errors = folder / f"stderr-{random.random()}"
    child = forks.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr = errors.open("w", buffering=1)
            logging.getLogger().handlers.clear()  # pytest's, so that warnings are printed as for a user
            with one_line_errors():
                act()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    with forks.kill_on_error(child):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = errors.read_text() if errors.exists() else ""
    errors.unlink(missing_ok=True)
    return status, text


@pytest.fixture(scope="module")
def uninterrupted(runs: Path) -> Callable[[str], dict[str, Any]]:
    """(case) -> what the uninterrupted run leaves."""
    ends: dict[str, dict[str, Any]] = {}

    def end(case: str) -> dict[str, Any]:
        if case not in ends:
            stage, options = CASES[case]
            out, started = f"uninterrupted {case}", time.monotonic()
            assert not forks.was_killed(lambda: small_runs.run(stage, runs, out, **options))
            SECONDS[case] = time.monotonic() - started
            ends[case] = small_runs.saved_state(runs / out)
        return ends[case]

    return end


@pytest.fixture
def check_resumed(runs: Path, uninterrupted: Callable[[str], dict[str, Any]]) -> Callable[[str, str], None]:
    """(case, folder) -> resume the run there and check that it ends like the uninterrupted one."""

    def check(case: str, out: str) -> None:
        stage, options = CASES[case]
        assert not forks.was_killed(lambda: small_runs.run(stage, runs, out, resume="auto", **options))
        end, expected = small_runs.saved_state(runs / out), uninterrupted(case)
        assert end["log"] == expected["log"]
        assert small_runs.identical(end, expected)
        assert not (runs / out / ".saving").exists() and not (runs / out / ".lock").exists()

    return check


def test_a_killed_fork_does_not_block_others() -> None:
    def die() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert forks.was_killed(die)
    assert not forks.was_killed(lambda: tqdm(range(2), disable=False).close(), 20.0)


@pytest.mark.fault("killed at a random moment (SIGKILL, as when memory runs out)")
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_random_moments_resumes(
    case: str, runs: Path, uninterrupted: Callable[[str], dict[str, Any]], check_resumed: Callable[[str, str], None],
    pytestconfig: pytest.Config, record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """Kills each run at random moments until it has ended, and starts further runs until there were `--kills` kills."""
    stage, options = CASES[case]
    uninterrupted(case)
    draw, kills, wanted = random.Random(case), 0, pytestconfig.getoption("--kills") / len(CASES)
    for number in itertools.count():
        out, before = f"random {case} {number}", kills
        while forks.was_killed(
            lambda out=out: small_runs.run(stage, runs, out, resume="auto", **options),  # type: ignore[misc]
            draw.uniform(0.0, SECONDS[case] * (1 + (kills - before) / 10)),
        ):
            kills += 1
        check_resumed(case, out)  # it has finished, so this changes nothing
        if kills >= max(1, wanted):
            break
    record_property("tries", kills)


def at_save(number: int, act: Callable[[], None]) -> None:
    """From now on, call `act` when this process starts to write its checkpoint of that number, counted from 1."""
    save, saves = SafeTrainer._save_checkpoint, 0

    def counted(self: Any, *args: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == number:
            act()
        save(self, *args)

    SafeTrainer._save_checkpoint = counted  # type: ignore[method-assign]


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


BYTES = [("second", 300), ("second", 150_000), ("first", 20_000)]
MORE_BYTES = [("second", 0), ("second", 20_000), ("first", 0), ("first", 300)]


@pytest.mark.fault("killed by the kernel at a byte of a file of the {which} checkpoint")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("which", "size"), [*BYTES, *(pytest.param(*each, marks=SLOW) for each in MORE_BYTES)])
def test_a_run_killed_at_a_byte_of_a_save_resumes(
    stage: str, which: str, size: int, runs: Path, check_resumed: Callable[[str, str], None]
) -> None:
    """The remains of a first save are neither taken for a run nor for files of the user."""
    out = f"{which} byte {size} {stage}"

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        at_save({"first": 1, "second": 2}[which], lambda: limit_file_size(size))
        small_runs.run(stage, runs, out)

    assert run_as_recipe(act, runs)[0] == -signal.SIGXFSZ
    checkpoints = list_checkpoints(runs / out)
    assert [path.name for path in checkpoints] == {"first": [], "second": ["checkpoint-2"]}[which]
    assert [find_damage(path) for path in checkpoints] == [None] * len(checkpoints)
    check_resumed(stage, out)


@pytest.mark.fault("the disk is full as a checkpoint is saved")
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_at_a_checkpoint_is_one_line(
    stage: str, runs: Path, check_resumed: Callable[[str, str], None]
) -> None:
    out = f"full {stage}"

    def act() -> None:
        at_save(2, lambda: limit_file_size(20_000))
        small_runs.run(stage, runs, out)

    code, errors = run_as_recipe(act, runs)
    assert code == 2 and "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint-4 could not be written") and "checkpoint-2 with --resume auto" in line
    assert not (runs / out / ".saving").exists()  # deleted, to free the space
    check_resumed(stage, out)


@pytest.mark.fault("stopped (SIGTERM)")
@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_a_checkpoint_to_resume_from(
    stage: str, runs: Path, check_resumed: Callable[[str, str], None]
) -> None:
    out = f"term {stage}"

    def act() -> None:
        step, steps = SafeTrainer.training_step, 0

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if self.state.global_step == 2:
                for _ in range(2):  # from a scheduler and from the launcher
                    os.kill(os.getpid(), signal.SIGTERM)
                SafeTrainer.training_step = step  # type: ignore[method-assign]
            return step(self, *args, **kwargs)

        SafeTrainer.training_step = counted  # type: ignore[method-assign]
        small_runs.run(stage, runs, out, save_strategy="no")

    code, errors = run_as_recipe(act, runs)
    assert code == 128 + signal.SIGTERM and "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == "stopped by SIGTERM; saved at step 3: resume with --resume auto"
    assert [path.name for path in list_checkpoints(runs / out)] == ["checkpoint-3"]
    check_resumed(stage, out)


def test_a_later_second_sigterm_ends_the_run_at_once(runs: Path) -> None:
    def act() -> None:
        def stop_twice(self: Any, *args: Any, **kwargs: Any) -> Any:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

        sigterm.REPEAT_SECONDS = 0.0
        SafeTrainer.training_step = stop_twice  # type: ignore[method-assign]
        small_runs.run("sft", runs, "stopped twice", save_strategy="no")

    assert run_as_recipe(act, runs)[0] == -signal.SIGTERM
    assert not list_checkpoints(runs / "stopped twice")


def after_training(act: Callable[[Any], None]) -> None:
    """From now on, call `act` with the trainer after training, before the model is saved."""
    train = SafeTrainer.train

    def acted(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = train(self, *args, **kwargs)
        act(self)
        return done

    SafeTrainer.train = acted  # type: ignore[method-assign]


@pytest.mark.fault("the disk is full as the model is saved")
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_at_the_end_is_one_line(stage: str, runs: Path, check_resumed: Callable[[str, str], None]) -> None:
    out = f"full at the end of {stage}"

    def act() -> None:
        after_training(lambda trainer: limit_file_size(20_000))
        small_runs.run(stage, runs, out)

    code, errors = run_as_recipe(act, runs)
    line = errors.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in errors and line.startswith(f"error: a file could not be written to {runs}")
    assert "with --resume auto" in line and not (runs / out / ".saving").exists()
    check_resumed(stage, out)


@pytest.mark.fault("the disk is full as completions are written", stage="ppo")
def test_a_full_disk_between_checkpoints_is_one_line(runs: Path, check_resumed: Callable[[str, str], None]) -> None:
    def act() -> None:
        limit_file_size(1_000)
        small_runs.run("ppo", runs, "full of answers", save_strategy="no")

    code, errors = run_as_recipe(act, runs)
    line = errors.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in errors and line.startswith(f"error: a file could not be written to {runs}")
    assert line.endswith("free space there: there is no checkpoint yet")
    check_resumed("ppo", "full of answers")


def drop_root_rights() -> None:
    """From now on, file modes hold for this process even if it runs as root."""
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capabilities


@pytest.mark.fault("the folder becomes read-only")
@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_becomes_read_only_is_one_line(
    stage: str, runs: Path, check_resumed: Callable[[str, str], None]
) -> None:
    out = f"closed {stage}"

    def act() -> None:
        drop_root_rights()
        at_save(2, lambda: (runs / out).chmod(0o555))
        small_runs.run(stage, runs, out)

    code, errors = run_as_recipe(act, runs)
    (runs / out).chmod(0o755)
    line = errors.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in errors
    assert line.startswith("error: checkpoint-4 could not be written") and "checkpoint-2 with --resume auto" in line
    assert find_damage(runs / out / "checkpoint-2") is None
    check_resumed(stage, out)


@pytest.mark.fault("the folder is read-only from the start")
@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_folder_is_refused_before_inputs_are_read(stage: str, runs: Path) -> None:
    closed = runs / f"read-only {stage}"
    closed.mkdir(mode=0o555)

    def act() -> None:
        drop_root_rights()
        small_runs.run(stage, runs, f"{closed.name}/run", model_name_or_path="nowhere")

    code, errors = run_as_recipe(act, runs)
    assert code == 2 and errors.splitlines() == [
        f"error: output folder {closed}/run cannot be written; choose another --output_dir"
    ]
    assert not list(closed.iterdir())


@pytest.mark.fault("out of memory in a step")
@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_is_one_line(stage: str, runs: Path, check_resumed: Callable[[str, str], None]) -> None:
    """The kernel refuses an allocation. (If it runs out of memory later, it kills: see the tests with SIGKILL.)"""
    out = f"memory {stage}"

    def act() -> None:
        step = SafeTrainer.training_step

        def large(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
                torch.ones(2**27)
            return step(self, *args, **kwargs)

        SafeTrainer.training_step = large  # type: ignore[method-assign]
        small_runs.run(stage, runs, out)

    code, errors = run_as_recipe(act, runs)
    line = errors.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in errors
    assert line.startswith("error: step 3: out of memory (") and "checkpoint-2 is the last checkpoint" in line
    assert "--per_device_train_batch_size" in line
    check_resumed(stage, out)


def unfinished(runs: Path, uninterrupted: Callable[[str], dict[str, Any]], stage: str, out: str) -> Path:
    """Copy the uninterrupted run as if it had been killed after its last checkpoint; return that checkpoint."""
    uninterrupted(stage)
    shutil.copytree(runs / f"uninterrupted {stage}", runs / out)
    (runs / out / "recipe.yaml").unlink()
    return list_checkpoints(runs / out)[0]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit flips": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "a file is truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "a file is missing": lambda path: path.unlink(),
    "a pickle is added": lambda path: path.with_name("pytorch_model.bin").write_bytes(b"x"),
}


@pytest.mark.parametrize(("name", "pickled"), [
    ("pytorch_model.bin", True), ("pytorch_model-00001-of-00002.bin", True), ("adapter_model.bin", True),
    ("pytorch_model_fsdp.bin", False),
])  # fmt: skip
def test_pickled_weights_are_refused_except_the_fsdp_state_of_accelerate(
    name: str, pickled: bool, tmp_path: Path
) -> None:
    """Under FSDP every checkpoint of Trainer has one; it is loaded with `weights_only`."""
    (tmp_path / "trainer_state.json").write_text("{}")
    torch.save({"weight": torch.ones(2)}, tmp_path / name)
    write_checksums(tmp_path)
    assert (find_damage(tmp_path) is not None) == pickled


@pytest.mark.fault("in the last checkpoint {how}")
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    stage: str, how: str, runs: Path,
    uninterrupted: Callable[[str], dict[str, Any]], check_resumed: Callable[[str, str], None],
) -> None:  # fmt: skip
    out = f"{how} {stage}"
    last = unfinished(runs, uninterrupted, stage, out)
    DAMAGES[how](last / ("optimizer.pt" if how == "a bit flips" else "model.safetensors"))
    code, errors = run_as_recipe(lambda: small_runs.run(stage, runs, out, resume="auto"), runs)
    assert code == 0 and f"{last.name} is damaged and is skipped" in errors
    check_resumed(stage, out)


@pytest.mark.fault("no checkpoint is intact", stage="sft")
def test_damaged_checkpoints_are_refused_if_none_is_intact(
    runs: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    last = unfinished(runs, uninterrupted, "sft", "none intact")
    for checkpoint in list_checkpoints(runs / "none intact"):
        (checkpoint / CHECKSUMS_FILE).write_text("0  model.safetensors\n")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is intact"):
        small_runs.run("sft", runs, "none intact", resume="auto")
    with pytest.raises(UserError, match=r"is damaged: model.safetensors differs from the saved file"):
        small_runs.run("sft", runs, "none intact", resume_from_checkpoint=last)


def test_a_finished_run_is_left_alone_or_refused_if_options_differ(
    runs: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    uninterrupted("sft")
    before = {path: path.stat().st_mtime_ns for path in (runs / "uninterrupted sft").rglob("*")}
    assert small_runs.run("sft", runs, "uninterrupted sft", resume="auto") == runs / "uninterrupted sft"
    harmless = {"disable_tqdm": False, "save_total_limit": 1}  # these change no weight
    assert small_runs.run("sft", runs, "uninterrupted sft", resume="auto", **harmless) == runs / "uninterrupted sft"
    assert {path: path.stat().st_mtime_ns for path in (runs / "uninterrupted sft").rglob("*")} == before
    with pytest.raises(UserError, match=r"holds a finished run with other options \(learning_rate 0.001 -> 0.5\)"):
        small_runs.run("sft", runs, "uninterrupted sft", resume="auto", learning_rate=0.5)


def test_a_finished_run_that_may_be_overwritten_starts_from_the_beginning(
    runs: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    """Otherwise its last checkpoint would be passed off as the result of the new options."""
    uninterrupted("sft")
    shutil.copytree(runs / "uninterrupted sft", runs / "replaced")
    small_runs.run("sft", runs, "replaced", resume="auto", overwrite=True, learning_rate=0.01)
    small_runs.run("sft", runs, "other", learning_rate=0.01)
    assert small_runs.identical(small_runs.saved_state(runs / "replaced"), small_runs.saved_state(runs / "other"))


def test_resuming_from_another_folder_overwrites_only_with_the_flag(
    runs: Path, uninterrupted: Callable[[str], dict[str, Any]], check_resumed: Callable[[str, str], None]
) -> None:
    uninterrupted("sft")
    uninterrupted("pretrain")
    shutil.copytree(runs / "uninterrupted pretrain", runs / "other stage")
    checkpoint = list_checkpoints(runs / "uninterrupted sft")[-1]
    before = {path: path.read_bytes() for path in (runs / "other stage").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is not empty"):
        small_runs.run("sft", runs, "other stage", resume_from_checkpoint=checkpoint)
    assert {path: path.read_bytes() for path in (runs / "other stage").rglob("*") if path.is_file()} == before
    small_runs.run("sft", runs, "other stage", resume_from_checkpoint=checkpoint, overwrite=True)
    assert checkpoint.is_dir()
    check_resumed("sft", "other stage")


def test_a_checkpoint_behind_a_link_belongs_to_the_run(
    runs: Path, uninterrupted: Callable[[str], dict[str, Any]], check_resumed: Callable[[str, str], None]
) -> None:
    last = unfinished(runs, uninterrupted, "sft", "linked")
    last.rename(runs / "elsewhere")
    last.symlink_to(runs / "elsewhere")
    shutil.rmtree(list_checkpoints(runs / "linked")[-1])
    (runs / "linked" / "model.safetensors").write_text("damaged")
    check_resumed("sft", "linked")
    with pytest.raises(UserError, match="holds the input"):
        small_runs.run("sft", runs, ".", resume_from_checkpoint=last, overwrite=True)


def test_a_token_in_the_arguments_is_in_no_checkpoint(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the masked value does not count as a difference when the run resumes."""
    token = "hf_" + "a1" * 17
    options = {"run_name": f"https://me:{token}@example.org", "save_total_limit": 9}
    run = small_runs.run("sft", runs, "secret", **options)
    saved = [path.read_text() for path in run.rglob("progress_*.json")]
    assert len(saved) == 3 and all(token not in text and "***" in text for text in saved)
    assert small_runs.run("sft", runs, "secret", resume="auto", **options) == run


def test_a_run_resumed_from_another_folder_resumes_from_its_own_checkpoint(
    runs: Path, uninterrupted: Callable[[str], dict[str, Any]], check_resumed: Callable[[str, str], None]
) -> None:
    small_runs.run("sft", runs, "source", save_total_limit=9)
    checkpoint = list_checkpoints(runs / "source")[-1]

    def act() -> None:
        at_save(2, lambda: os._exit(9))
        small_runs.run("sft", runs, "from elsewhere", resume="auto", resume_from_checkpoint=checkpoint)

    assert run_as_recipe(act, runs)[0] == 9
    assert list_checkpoints(runs / "from elsewhere")[0].name == "checkpoint-4"
    check_resumed("sft", "from elsewhere")


@pytest.mark.parametrize(
    "options", [{}, {"resume": "auto"}, {"overwrite": True}, {"resume": "auto", "overwrite": True}]
)
def test_files_that_only_look_like_a_run_are_left_alone(options: dict[str, Any], runs: Path, tmp_path: Path) -> None:
    files = [
        "checkpoint-best/model.bin",
        "checkpoint-1000.pt",
        "checkpoint-3/mine.txt",
        "notes.md",
        "trainer_state.txt",
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"is not empty|that no stage wrote|none of the 1 checkpoints"):
        small_runs.run("sft", runs, str(tmp_path), **options)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        files
    )


def test_options_that_differ_from_the_checkpoint_are_warned_of(
    runs: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    unfinished(runs, uninterrupted, "sft", "other options")
    act = lambda: small_runs.run("sft", runs, "other options", resume="auto", max_grad_norm=2.0)  # noqa: E731
    code, errors = run_as_recipe(act, runs)
    assert code == 0 and "saved with other options than this run: max_grad_norm 1.0 -> 2.0" in errors


@pytest.mark.fault("the loss is not finite")
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_a_non_finite_loss_ends_the_run_and_is_not_saved(
    stage: str, runs: Path, check_resumed: Callable[[str, str], None]
) -> None:
    out = f"nan {stage}"

    def act() -> None:
        step = Trainer.training_step

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            loss = step(self, *args, **kwargs)
            return loss * torch.nan if self.state.global_step == 4 else loss

        Trainer.training_step = broken  # type: ignore[method-assign]
        small_runs.run(stage, runs, out)

    code, errors = run_as_recipe(act, runs)
    line = errors.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: step 5: the loss is not finite, and nothing of it is saved; ")
    assert line.endswith("look for the rows that cause it") and "checkpoint-4 is the last checkpoint" in line
    check_resumed(stage, out)


@pytest.mark.fault("a weight is not finite")
@pytest.mark.parametrize("stage", STAGES)
def test_non_finite_weights_are_not_saved(stage: str, runs: Path, check_resumed: Callable[[str, str], None]) -> None:
    """A gradient can overflow although the loss is finite."""
    out = f"inf {stage}"

    def act() -> None:
        save = SafeTrainer._save_checkpoint

        def broken(self: Any, *args: Any) -> None:
            if self.state.global_step == 4:
                next(self.model.parameters()).data[0, 0] = torch.inf
            save(self, *args)

        SafeTrainer._save_checkpoint = broken  # type: ignore[method-assign]
        small_runs.run(stage, runs, out)

    code, errors = run_as_recipe(act, runs)
    assert code == 2 and "a weight is not finite, and nothing of it is saved" in errors.strip().splitlines()[-1]
    assert [path.name for path in list_checkpoints(runs / out)] == ["checkpoint-2"]
    check_resumed(stage, out)


@pytest.mark.fault("a weight is not finite at the end of a run without checkpoints")
@pytest.mark.parametrize("stage", STAGES)
def test_non_finite_weights_are_not_saved_at_the_end(
    stage: str, runs: Path, check_resumed: Callable[[str, str], None]
) -> None:
    out = f"inf at the end of {stage}"

    def spoil(trainer: Any) -> None:
        next(trainer.model.parameters()).data[0, 0] = torch.nan

    def act() -> None:
        after_training(spoil)
        small_runs.run(stage, runs, out, save_strategy="no")

    code, errors = run_as_recipe(act, runs)
    assert code == 2 and "a weight is not finite, and nothing of it is saved" in errors.strip().splitlines()[-1]
    assert not list((runs / out).rglob("*.safetensors"))
    check_resumed(stage, out)


@pytest.mark.fault("weights become non-finite in a step", stage="ppo")
def test_non_finite_weights_end_a_ppo_run(runs: Path, check_resumed: Callable[[str, str], None]) -> None:
    """PPO skips a non-finite loss, and with such weights every loss is."""

    def act() -> None:
        step = SafeTrainer.training_step

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 5:
                next(self.model.parameters()).data.fill_(torch.nan)
            return step(self, *args, **kwargs)

        SafeTrainer.training_step = broken  # type: ignore[method-assign]
        small_runs.run("ppo", runs, "inf on the way")

    code, errors = run_as_recipe(act, runs)
    line = errors.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: step 5: a weight is not finite, and nothing of it is saved; ")
    assert "checkpoint-4 is the last checkpoint" in line
    check_resumed("ppo", "inf on the way")


@pytest.mark.parametrize(("rank", "part", "finite"), [
    (0, [1.0, 2.0], True), (1, [3.0, torch.nan], True), (2, [torch.nan] * 2, True), (0, [1.0, torch.inf], False),
    (1, [torch.nan, 0.0], False),
])  # fmt: skip
def test_padding_of_a_zero3_shard_does_not_count_as_non_finite(rank: int, part: list[float], finite: bool) -> None:
    """Three numbers in shards of two on three processes: DeepSpeed leaves the padding uninitialized."""
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_numel, parameter.ds_zero_partition_rank = torch.tensor(part), 3, rank
    assert bool(torch.isfinite(local_shard(parameter)).all()) == finite


def test_checking_a_lock_does_not_block_taking_it(tmp_path: Path) -> None:
    """All processes of a run check the file of a dead owner at the same time, and then rank 0 takes the lock."""
    (tmp_path / LOCK_FILE).write_text("process 1 on elsewhere\n")
    checking = (tmp_path / LOCK_FILE).open()
    fcntl.flock(checking, fcntl.LOCK_SH)
    require_unlocked(tmp_path)
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere"), folder_lock(tmp_path):
        pass
    threading.Timer(0.2, checking.close).start()
    with folder_lock(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK_FILE).read_text()


@pytest.mark.fault("a second run in the folder", stage="sft")
def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(
    runs: Path, check_resumed: Callable[[str, str], None]
) -> None:
    ready, hold = os.pipe()

    def first() -> None:
        def wait() -> None:
            os.write(hold, b"x")
            signal.pause()

        at_save(2, wait)
        small_runs.run("sft", runs, "shared folder")

    child = forks.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            first()
        finally:
            os._exit(1)
    os.close(hold)  # so that reading also ends if the child ends too early
    with forks.kill_on_error(child):
        assert os.read(ready, 1) == b"x"
        for options in ({"resume": "auto"}, {"overwrite": True}, {"resume_from_checkpoint": "true"}):
            with pytest.raises(UserError, match=f"is in use by process {child} on .*; choose another --output_dir"):
                small_runs.run("sft", runs, "shared folder", **options)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    check_resumed("sft", "shared folder")


@pytest.mark.fault("the reward model crashes", stage="ppo")
def test_a_crash_of_the_reward_model_loses_nothing(runs: Path, check_resumed: Callable[[str, str], None]) -> None:
    from rlhf_recipes.scoring.reward_models import ModelReward

    def act() -> None:
        score, calls = ModelReward.__call__, 0

        def crash(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("the reward model crashed")
            return score(self, *args, **kwargs)

        ModelReward.__call__ = crash  # type: ignore[method-assign]
        small_runs.run("ppo", runs, "crashed reward model")

    code, errors = run_as_recipe(act, runs)
    assert code == 1 and "the reward model crashed" in errors
    assert list_checkpoints(runs / "crashed reward model")
    check_resumed("ppo", "crashed reward model")


@pytest.mark.fault("a data file is truncated within a line")
@pytest.mark.parametrize("stage", STAGES)
def test_a_truncated_data_file_is_named_before_anything_is_written(stage: str, runs: Path) -> None:
    name = small_runs.STAGE_FLAGS[stage]["dataset_name"]
    truncated = runs / f"truncated {name}"
    shutil.copytree(runs / name, truncated)
    rows = truncated / "train.jsonl"
    rows.write_bytes(rows.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{truncated}/train.jsonl, line \d+, column \d+ cannot be read as JSON"):
        small_runs.run(stage, runs, f"from truncated {stage}", dataset_name=truncated.name)
    assert not (runs / f"from truncated {stage}").exists()


def test_the_pickled_arguments_of_trainer_are_not_saved(
    runs: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    for stage in STAGES:
        uninterrupted(stage)
        assert not list((runs / f"uninterrupted {stage}").rglob("training_args.bin"))
