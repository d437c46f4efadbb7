"""Runs that are killed, told to end, out of disk, fed a NaN or a broken checkpoint: nothing that was saved is lost.

Each ends, after `--resume auto`, bit for bit as the run that nothing happened to.
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


SECONDS: dict[str, float] = {}  # that the whole run of each case took


def told(act: Callable[[], Any], folder: Path) -> tuple[int, str]:
    """Run in a process of its own, as a door does; returns its exit code (minus the signal) and what it said on stderr."""
    said = folder / f"said-{random.random()}"

    child = forks.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr = said.open("w", buffering=1)
            logging.getLogger().handlers.clear()  # pytest's own, so that warnings go where they go for a user
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
    text = said.read_text() if said.exists() else ""
    said.unlink(missing_ok=True)
    return status, text


@pytest.fixture(scope="module")
def whole(runs: Path) -> Callable[[str], dict[str, Any]]:
    """(case) -> how the run ends that nothing happens to."""
    ends: dict[str, dict[str, Any]] = {}

    def end(case: str) -> dict[str, Any]:
        if case not in ends:
            stage, options = CASES[case]
            out, started = f"whole {case}", time.monotonic()
            assert not forks.was_killed(lambda: small_runs.run(stage, runs, out, **options))
            SECONDS[case] = time.monotonic() - started
            ends[case] = small_runs.end_of(runs / out)
        return ends[case]

    return end


@pytest.fixture
def again(runs: Path, whole: Callable[[str], dict[str, Any]]) -> Callable[[str, str], None]:
    """(case, folder) -> resume the run there, and it must end as the whole one."""

    def check(case: str, out: str) -> None:
        stage, options = CASES[case]
        assert not forks.was_killed(lambda: small_runs.run(stage, runs, out, resume="auto", **options))
        end, expected = small_runs.end_of(runs / out), whole(case)
        assert end["log"] == expected["log"]
        assert small_runs.identical(end, expected)
        assert not (runs / out / ".saving").exists() and not (runs / out / ".lock").exists()

    return check


def test_a_fork_that_is_killed_locks_no_other_out() -> None:
    def die() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert forks.was_killed(die)
    assert not forks.was_killed(lambda: tqdm(range(2), disable=False).close(), 20.0)


@pytest.mark.fault("killed at a random moment (SIGKILL, as for want of memory)")
@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments(
    case: str, runs: Path, whole: Callable[[str], dict[str, Any]], again: Callable[[str, str], None],
    pytestconfig: pytest.Config, record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """One run after the other, each killed until it has ended, until there were so many kills."""
    stage, options = CASES[case]
    whole(case)
    draw, kills, wanted = random.Random(case), 0, pytestconfig.getoption("--kills") / len(CASES)
    for number in itertools.count():
        out, before = f"random {case} {number}", kills
        while forks.was_killed(
            lambda out=out: small_runs.run(stage, runs, out, resume="auto", **options),  # type: ignore[misc]
            draw.uniform(0.0, SECONDS[case] * (1 + (kills - before) / 10)),
        ):
            kills += 1
        again(case, out)  # finished: nothing is left to do, and nothing is undone
        if kills >= max(1, wanted):
            break
    record_property("tries", kills)


def in_save(number: int, act: Callable[[], None]) -> None:
    """From now on `act` is called as that checkpoint of this process, counted from 1, begins to be written."""
    save, saves = SafeTrainer._save_checkpoint, 0

    def counted(self: Any, *args: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == number:
            act()
        save(self, *args)

    SafeTrainer._save_checkpoint = counted  # type: ignore[method-assign]


def no_file_beyond(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


BYTES = [("second", 300), ("second", 150_000), ("first", 20_000)]
BYTES_TOO = [("second", 0), ("second", 20_000), ("first", 0), ("first", 300)]


@pytest.mark.fault("ended by the kernel at a byte of a file of the {which} checkpoint")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("which", "size"), [*BYTES, *(pytest.param(*each, marks=SLOW) for each in BYTES_TOO)])
def test_killed_at_a_byte_of_a_save(
    stage: str, which: str, size: int, runs: Path, again: Callable[[str, str], None]
) -> None:
    """Of the first save, what is left tells of no run, and is not taken for somebody else's files."""
    out = f"{which} byte {size} {stage}"

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        in_save({"first": 1, "second": 2}[which], lambda: no_file_beyond(size))
        small_runs.run(stage, runs, out)

    assert told(act, runs)[0] == -signal.SIGXFSZ
    kept = list_checkpoints(runs / out)
    assert [path.name for path in kept] == {"first": [], "second": ["checkpoint-2"]}[which]
    assert [find_damage(path) for path in kept] == [None] * len(kept)
    again(stage, out)


@pytest.mark.fault("the disk takes no more of a checkpoint")
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_the_run_in_one_line(stage: str, runs: Path, again: Callable[[str, str], None]) -> None:
    out = f"full {stage}"

    def act() -> None:
        in_save(2, lambda: no_file_beyond(20_000))
        small_runs.run(stage, runs, out)

    code, said = told(act, runs)
    assert code == 2 and "Traceback" not in said
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint-4 could not be written") and "checkpoint-2 with --resume auto" in line
    assert not (runs / out / ".saving").exists()  # what was half written makes room
    again(stage, out)


@pytest.mark.fault("told to end (SIGTERM)")
@pytest.mark.parametrize("stage", STAGES)
def test_told_to_end_it_saves_and_goes_on_later(stage: str, runs: Path, again: Callable[[str, str], None]) -> None:
    out = f"term {stage}"

    def act() -> None:
        step, steps = SafeTrainer.training_step, 0

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if self.state.global_step == 2:
                for _ in range(2):  # a scheduler tells every process, and the launcher among them tells its own
                    os.kill(os.getpid(), signal.SIGTERM)
                SafeTrainer.training_step = step  # type: ignore[method-assign]
            return step(self, *args, **kwargs)

        SafeTrainer.training_step = counted  # type: ignore[method-assign]
        small_runs.run(stage, runs, out, save_strategy="no")

    code, said = told(act, runs)
    assert code == 128 + signal.SIGTERM and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "stopped by SIGTERM; saved at step 3: resume with --resume auto"
    assert [path.name for path in list_checkpoints(runs / out)] == ["checkpoint-3"]
    again(stage, out)


def test_told_to_end_once_more_later_it_ends_at_once(runs: Path) -> None:
    def act() -> None:
        def impatient(self: Any, *args: Any, **kwargs: Any) -> Any:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

        sigterm.REPEAT_SECONDS = 0.0
        SafeTrainer.training_step = impatient  # type: ignore[method-assign]
        small_runs.run("sft", runs, "told twice", save_strategy="no")

    assert told(act, runs)[0] == -signal.SIGTERM
    assert not list_checkpoints(runs / "told twice")


def after_training(act: Callable[[Any], None]) -> None:
    """From now on `act` is called with the trainer of this process once it has trained, before anything of it is left."""
    train = SafeTrainer.train

    def acted(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = train(self, *args, **kwargs)
        act(self)
        return done

    SafeTrainer.train = acted  # type: ignore[method-assign]


@pytest.mark.fault("the disk takes no more of the model at the end")
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_at_the_end_ends_the_run_in_one_line(
    stage: str, runs: Path, again: Callable[[str, str], None]
) -> None:
    out = f"full at the end of {stage}"

    def act() -> None:
        after_training(lambda trainer: no_file_beyond(20_000))
        small_runs.run(stage, runs, out)

    code, said = told(act, runs)
    line = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said and line.startswith(f"error: a file could not be written to {runs}")
    assert "with --resume auto" in line and not (runs / out / ".saving").exists()
    again(stage, out)


@pytest.mark.fault("the disk takes no more answers", stage="ppo")
def test_a_disk_that_is_full_between_checkpoints_ends_the_run_in_one_line(
    runs: Path, again: Callable[[str, str], None]
) -> None:
    def act() -> None:
        no_file_beyond(1_000)
        small_runs.run("ppo", runs, "full of answers", save_strategy="no")

    code, said = told(act, runs)
    line = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said and line.startswith(f"error: a file could not be written to {runs}")
    assert line.endswith("free space there: there is no checkpoint yet")
    again("ppo", "full of answers")


def as_anybody() -> None:
    """From now on this process may write only where modes of files let it, should it be root's."""
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capability is left


@pytest.mark.fault("the folder lets nothing be written any more")
@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_becomes_read_only_ends_the_run_in_one_line(
    stage: str, runs: Path, again: Callable[[str, str], None]
) -> None:
    out = f"closed {stage}"

    def act() -> None:
        as_anybody()
        in_save(2, lambda: (runs / out).chmod(0o555))
        small_runs.run(stage, runs, out)

    code, said = told(act, runs)
    (runs / out).chmod(0o755)
    line = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said
    assert line.startswith("error: checkpoint-4 could not be written") and "checkpoint-2 with --resume auto" in line
    assert find_damage(runs / out / "checkpoint-2") is None
    again(stage, out)


@pytest.mark.fault("the folder is read-only from the start")
@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_folder_is_refused_before_anything_is_read(stage: str, runs: Path) -> None:
    closed = runs / f"read-only {stage}"
    closed.mkdir(mode=0o555)

    def act() -> None:
        as_anybody()
        small_runs.run(stage, runs, f"{closed.name}/run", model_name_or_path="nowhere")

    code, said = told(act, runs)
    assert code == 2 and said.splitlines() == [
        f"error: output folder {closed}/run cannot be written; choose another --output_dir"
    ]
    assert not list(closed.iterdir())


@pytest.mark.fault("no memory is left for a step")
@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_ends_the_run_in_one_line(stage: str, runs: Path, again: Callable[[str, str], None]) -> None:
    """What the kernel refuses to give. (What it gives and takes back is a SIGKILL: see above.)"""
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

    code, said = told(act, runs)
    line = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said
    assert line.startswith("error: step 3: out of memory (") and "checkpoint-2 is the last checkpoint" in line
    assert "--per_device_train_batch_size" in line
    again(stage, out)


def unfinished(runs: Path, whole: Callable[[str], dict[str, Any]], stage: str, out: str) -> Path:
    """A copy of the whole run, as if it had been cut off right after its last checkpoint; returns that."""
    whole(stage)
    shutil.copytree(runs / f"whole {stage}", runs / out)
    (runs / out / "recipe.yaml").unlink()
    return list_checkpoints(runs / out)[0]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit flips": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "a file is cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "a file is gone": lambda path: path.unlink(),
    "a pickle is put beside": lambda path: path.with_name("pytorch_model.bin").write_bytes(b"x"),
}


@pytest.mark.parametrize(("name", "pickled"), [
    ("pytorch_model.bin", True), ("pytorch_model-00001-of-00002.bin", True), ("adapter_model.bin", True),
    ("pytorch_model_fsdp.bin", False),
])  # fmt: skip
def test_weights_in_a_pickle_are_refused_but_not_the_state_that_accelerate_saves_of_fsdp(
    name: str, pickled: bool, tmp_path: Path
) -> None:
    """Under FSDP each checkpoint of Trainer's has one; it is read with `weights_only`."""
    (tmp_path / "trainer_state.json").write_text("{}")
    torch.save({"weight": torch.ones(2)}, tmp_path / name)
    write_checksums(tmp_path)
    assert (find_damage(tmp_path) is not None) == pickled


@pytest.mark.fault("of the last checkpoint {how}")
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    stage: str, how: str, runs: Path,
    whole: Callable[[str], dict[str, Any]], again: Callable[[str, str], None],
) -> None:  # fmt: skip
    out = f"{how} {stage}"
    last = unfinished(runs, whole, stage, out)
    DAMAGES[how](last / ("optimizer.pt" if how == "a bit flips" else "model.safetensors"))
    code, said = told(lambda: small_runs.run(stage, runs, out, resume="auto"), runs)
    assert code == 0 and f"{last.name} is damaged and is skipped" in said
    again(stage, out)


@pytest.mark.fault("no checkpoint is whole", stage="sft")
def test_no_whole_checkpoint_is_said_and_a_damaged_one_is_not_taken_by_name(
    runs: Path, whole: Callable[[str], dict[str, Any]]
) -> None:
    last = unfinished(runs, whole, "sft", "none whole")
    for point in list_checkpoints(runs / "none whole"):
        (point / CHECKSUMS_FILE).write_text("0  model.safetensors\n")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is intact"):
        small_runs.run("sft", runs, "none whole", resume="auto")
    with pytest.raises(UserError, match=r"is damaged: model.safetensors differs from the saved file"):
        small_runs.run("sft", runs, "none whole", resume_from_checkpoint=last)


def test_a_finished_run_is_left_alone_unless_it_was_asked_otherwise(
    runs: Path, whole: Callable[[str], dict[str, Any]]
) -> None:
    whole("sft")
    before = {path: path.stat().st_mtime_ns for path in (runs / "whole sft").rglob("*")}
    assert small_runs.run("sft", runs, "whole sft", resume="auto") == runs / "whole sft"
    how = {"disable_tqdm": False, "save_total_limit": 1}  # says nothing of what was learnt
    assert small_runs.run("sft", runs, "whole sft", resume="auto", **how) == runs / "whole sft"
    assert {path: path.stat().st_mtime_ns for path in (runs / "whole sft").rglob("*")} == before
    with pytest.raises(UserError, match=r"holds a finished run with other options \(learning_rate 0.001 -> 0.5\)"):
        small_runs.run("sft", runs, "whole sft", resume="auto", learning_rate=0.5)


def test_a_finished_run_that_may_be_replaced_is_begun_anew(runs: Path, whole: Callable[[str], dict[str, Any]]) -> None:
    """Its last checkpoint would come out as what was learnt in the new way."""
    whole("sft")
    shutil.copytree(runs / "whole sft", runs / "replaced")
    small_runs.run("sft", runs, "replaced", resume="auto", overwrite=True, learning_rate=0.01)
    small_runs.run("sft", runs, "other", learning_rate=0.01)
    assert small_runs.identical(small_runs.end_of(runs / "replaced"), small_runs.end_of(runs / "other"))


def test_going_on_from_elsewhere_replaces_nothing_that_it_may_not(
    runs: Path, whole: Callable[[str], dict[str, Any]], again: Callable[[str, str], None]
) -> None:
    whole("sft")
    whole("pretrain")
    shutil.copytree(runs / "whole pretrain", runs / "theirs")
    point = list_checkpoints(runs / "whole sft")[-1]
    before = {path: path.read_bytes() for path in (runs / "theirs").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is not empty"):
        small_runs.run("sft", runs, "theirs", resume_from_checkpoint=point)
    assert {path: path.read_bytes() for path in (runs / "theirs").rglob("*") if path.is_file()} == before
    small_runs.run("sft", runs, "theirs", resume_from_checkpoint=point, overwrite=True)
    assert point.is_dir()
    again("sft", "theirs")


def test_a_checkpoint_that_lies_on_another_disk_is_the_run_s_own(
    runs: Path, whole: Callable[[str], dict[str, Any]], again: Callable[[str, str], None]
) -> None:
    last = unfinished(runs, whole, "sft", "linked")
    last.rename(runs / "elsewhere")
    last.symlink_to(runs / "elsewhere")
    shutil.rmtree(list_checkpoints(runs / "linked")[-1])
    (runs / "linked" / "model.safetensors").write_text("spoilt")
    again("sft", "linked")
    with pytest.raises(UserError, match="holds the input"):
        small_runs.run("sft", runs, ".", resume_from_checkpoint=last, overwrite=True)


def test_a_token_in_what_was_asked_is_in_no_checkpoint(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it a difference, as the run goes on."""
    token = "hf_" + "a1" * 17
    asked = {"run_name": f"https://me:{token}@example.org", "save_total_limit": 9}
    run = small_runs.run("sft", runs, "secret", **asked)
    told = [path.read_text() for path in run.rglob("progress_*.json")]
    assert len(told) == 3 and all(token not in text and "***" in text for text in told)
    assert small_runs.run("sft", runs, "secret", resume="auto", **asked) == run


def test_a_run_from_elsewhere_that_is_cut_off_goes_on_from_its_own(
    runs: Path, whole: Callable[[str], dict[str, Any]], again: Callable[[str, str], None]
) -> None:
    small_runs.run("sft", runs, "source", save_total_limit=9)
    point = list_checkpoints(runs / "source")[-1]

    def act() -> None:
        in_save(2, lambda: os._exit(9))
        small_runs.run("sft", runs, "from elsewhere", resume="auto", resume_from_checkpoint=point)

    assert told(act, runs)[0] == 9
    assert list_checkpoints(runs / "from elsewhere")[0].name == "checkpoint-4"
    again("sft", "from elsewhere")


@pytest.mark.parametrize("asked", [{}, {"resume": "auto"}, {"overwrite": True}, {"resume": "auto", "overwrite": True}])
def test_what_only_looks_like_a_run_is_left_alone(asked: dict[str, Any], runs: Path, tmp_path: Path) -> None:
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
        small_runs.run("sft", runs, str(tmp_path), **asked)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        files
    )


def test_what_a_checkpoint_was_asked_otherwise_is_said(runs: Path, whole: Callable[[str], dict[str, Any]]) -> None:
    unfinished(runs, whole, "sft", "otherwise")
    act = lambda: small_runs.run("sft", runs, "otherwise", resume="auto", max_grad_norm=2.0)  # noqa: E731
    code, said = told(act, runs)
    assert code == 0 and "saved with other options than this run: max_grad_norm 1.0 -> 2.0" in said


@pytest.mark.fault("the loss is not finite")
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(
    stage: str, runs: Path, again: Callable[[str, str], None]
) -> None:
    out = f"nan {stage}"

    def act() -> None:
        step = Trainer.training_step

        def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
            loss = step(self, *args, **kwargs)
            return loss * torch.nan if self.state.global_step == 4 else loss

        Trainer.training_step = spoilt  # type: ignore[method-assign]
        small_runs.run(stage, runs, out)

    code, said = told(act, runs)
    line = said.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: step 5: the loss is not finite, and nothing of it is saved; ")
    assert line.endswith("look for the rows that cause it") and "checkpoint-4 is the last checkpoint" in line
    again(stage, out)


@pytest.mark.fault("a weight is not finite")
@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_are_not_finite_are_not_saved(stage: str, runs: Path, again: Callable[[str, str], None]) -> None:
    """A gradient can overflow where the loss did not."""
    out = f"inf {stage}"

    def act() -> None:
        save = SafeTrainer._save_checkpoint

        def spoilt(self: Any, *args: Any) -> None:
            if self.state.global_step == 4:
                next(self.model.parameters()).data[0, 0] = torch.inf
            save(self, *args)

        SafeTrainer._save_checkpoint = spoilt  # type: ignore[method-assign]
        small_runs.run(stage, runs, out)

    code, said = told(act, runs)
    assert code == 2 and "a weight is not finite, and nothing of it is saved" in said.strip().splitlines()[-1]
    assert [path.name for path in list_checkpoints(runs / out)] == ["checkpoint-2"]
    again(stage, out)


@pytest.mark.fault("a weight is not finite at the end, and no checkpoint was asked for")
@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_are_not_finite_are_not_left_at_the_end(
    stage: str, runs: Path, again: Callable[[str, str], None]
) -> None:
    out = f"inf at the end of {stage}"

    def spoil(trainer: Any) -> None:
        next(trainer.model.parameters()).data[0, 0] = torch.nan

    def act() -> None:
        after_training(spoil)
        small_runs.run(stage, runs, out, save_strategy="no")

    code, said = told(act, runs)
    assert code == 2 and "a weight is not finite, and nothing of it is saved" in said.strip().splitlines()[-1]
    assert not list((runs / out).rglob("*.safetensors"))
    again(stage, out)


@pytest.mark.fault("a weight is not finite from some step on", stage="ppo")
def test_ppo_does_not_go_on_with_weights_that_are_not_finite(runs: Path, again: Callable[[str, str], None]) -> None:
    """A loss that is not finite is passed over, and of such weights every loss is."""

    def act() -> None:
        step = SafeTrainer.training_step

        def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 5:
                next(self.model.parameters()).data.fill_(torch.nan)
            return step(self, *args, **kwargs)

        SafeTrainer.training_step = spoilt  # type: ignore[method-assign]
        small_runs.run("ppo", runs, "inf on the way")

    code, said = told(act, runs)
    line = said.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: step 5: a weight is not finite, and nothing of it is saved; ")
    assert "checkpoint-4 is the last checkpoint" in line
    again("ppo", "inf on the way")


@pytest.mark.parametrize(("rank", "part", "finite"), [
    (0, [1.0, 2.0], True), (1, [3.0, torch.nan], True), (2, [torch.nan] * 2, True), (0, [1.0, torch.inf], False),
    (1, [torch.nan, 0.0], False),
])  # fmt: skip
def test_of_a_weight_that_zero_3_cuts_apart_what_is_past_its_end_does_not_count(
    rank: int, part: list[float], finite: bool
) -> None:
    """Three numbers for three processes, two to each: DeepSpeed leaves the rest of the memory as it finds it."""
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_numel, parameter.ds_zero_partition_rank = torch.tensor(part), 3, rank
    assert bool(torch.isfinite(local_shard(parameter)).all()) == finite


def test_looking_for_a_lock_is_in_nobody_s_way(tmp_path: Path) -> None:
    """A dead owner's file is left; all processes of a run look at it at the same time, and then the first takes it."""
    (tmp_path / LOCK_FILE).write_text("process 1 on elsewhere\n")
    looking = (tmp_path / LOCK_FILE).open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    require_unlocked(tmp_path)
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere"), folder_lock(tmp_path):
        pass
    threading.Timer(0.2, looking.close).start()
    with folder_lock(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK_FILE).read_text()


@pytest.mark.fault("a second run in the folder", stage="sft")
def test_two_runs_in_one_folder_are_refused_until_the_first_is_dead(
    runs: Path, again: Callable[[str, str], None]
) -> None:
    ready, hold = os.pipe()

    def first() -> None:
        def wait() -> None:
            os.write(hold, b"x")
            signal.pause()

        in_save(2, wait)
        small_runs.run("sft", runs, "shared folder")

    child = forks.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            first()
        finally:
            os._exit(1)
    os.close(hold)  # so that a child that ends too early is heard as well
    with forks.kill_on_error(child):
        assert os.read(ready, 1) == b"x"
        for asked in ({"resume": "auto"}, {"overwrite": True}, {"resume_from_checkpoint": "true"}):
            with pytest.raises(UserError, match=f"is in use by process {child} on .*; choose another --output_dir"):
                small_runs.run("sft", runs, "shared folder", **asked)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    again("sft", "shared folder")


@pytest.mark.fault("the reward model crashes", stage="ppo")
def test_a_reward_model_that_crashes_loses_nothing(runs: Path, again: Callable[[str, str], None]) -> None:
    from rlhf_recipes.scoring.reward_models import ModelReward

    def act() -> None:
        ask, calls = ModelReward.__call__, 0

        def deadly(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("the reward model is gone")
            return ask(self, *args, **kwargs)

        ModelReward.__call__ = deadly  # type: ignore[method-assign]
        small_runs.run("ppo", runs, "crashed reward model")

    code, said = told(act, runs)
    assert code == 1 and "the reward model is gone" in said
    assert list_checkpoints(runs / "crashed reward model")
    again("ppo", "crashed reward model")


@pytest.mark.fault("a data file is cut in a line")
@pytest.mark.parametrize("stage", STAGES)
def test_a_data_file_cut_in_a_line_is_named_before_anything_is_written(stage: str, runs: Path) -> None:
    name = small_runs.OWN[stage]["dataset_name"]
    cut = runs / f"cut {name}"
    shutil.copytree(runs / name, cut)
    rows = cut / "train.jsonl"
    rows.write_bytes(rows.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=rf"dataset {cut} cannot be read as json: .* in row \d+; fix or replace the file"
    ):
        small_runs.run(stage, runs, f"from cut {stage}", dataset_name=cut.name)
    assert not (runs / f"from cut {stage}").exists()


def test_trainers_own_pickle_of_arguments_is_left_out(runs: Path, whole: Callable[[str], dict[str, Any]]) -> None:
    for stage in STAGES:
        whole(stage)
        assert not list((runs / f"whole {stage}").rglob("training_args.bin"))
