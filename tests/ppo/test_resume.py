"""Point 13: runs that are really killed, and end as the one that was not. See programs/kill_and_resume.py."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import forks, kill_and_resume, small_runs

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, make_policy: Make, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "policy"
    make_policy(0, initializer_range=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(policy: Path) -> dict[str, Any]:
    """Of each case, how the uninterrupted run ended."""
    for case in kill_and_resume.CASES:
        assert not forks.was_killed(lambda case=case: kill_and_resume.train(policy, policy.parent / case, case))
    return {case: kill_and_resume.end_of(policy.parent / case) for case in kill_and_resume.CASES}


@pytest.mark.parametrize("case", ["full", "upper", "lora"])
def test_runs_killed_at_random_match_the_uninterrupted_run(
    case: str, policy: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    draw = random.Random(case)
    assert kill_and_resume.killed_until_done(policy, tmp_path, case, draw, longest=1.0) > 0
    assert small_runs.identical(kill_and_resume.end_of(tmp_path), whole[case])


def kill_at(owner: Any, name: str, call: int, cut: bool) -> None:
    """From now on the process dies in the so manieth call of a function, having written half of its file if `cut`."""
    function, calls = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return function(*args, **kwargs)
        if cut:
            path = next(Path(value) for value in reversed(args) if isinstance(value, (str, Path)))
            function(*args, **kwargs)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)


def places() -> dict[str, tuple[Any, str, int, bool]]:
    """Where a run is cut off: owner and name of a function, in which call, and whether its file is cut as well."""
    import torch
    from transformers import TrainerState

    from rlhf_recipes.ppo import resume as resuming
    from rlhf_recipes.ppo.logging import callbacks
    from rlhf_recipes.ppo.roles import value as value_head
    from rlhf_recipes.ppo.trainer import PPOTrainer
    from rlhf_recipes.training import trainer as safe_trainer

    return {
        "as it answers": (PPOTrainer, "generate", 3, False),
        "as it scores": (PPOTrainer, "score", 4, False),
        "between two minibatches": (PPOTrainer, "compute_loss", 13, False),
        "as the value is saved": (value_head, "save_file", 6, True),
        "as the rollout is saved": (resuming, "save_file", 5, True),
        "as the optimizer is saved": (torch, "save", 16, True),
        "as the state is saved": (TrainerState, "save_to_json", 7, True),
        "as an old checkpoint goes": (safe_trainer, "rotate_checkpoints", 7, False),
        "as answers are written": (callbacks.CompletionsFile, "add", 3, False),
    }


PLACES = [
    "as it answers", "as it scores", "between two minibatches", "as the value is saved", "as the rollout is saved",
    "as the optimizer is saved", "as the state is saved", "as an old checkpoint goes", "as answers are written",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_at_a_chosen_call_matches_the_uninterrupted_run(
    place: str, policy: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    def die() -> None:
        kill_at(*places()[place])
        kill_and_resume.train(policy, tmp_path, "full")

    assert forks.was_killed(die), "the run was to be cut off"
    assert not forks.was_killed(lambda: kill_and_resume.train(policy, tmp_path, "full"))
    assert small_runs.identical(kill_and_resume.end_of(tmp_path), whole["full"])


@pytest.mark.slow
def test_thirty_random_kills_match_the_uninterrupted_run(policy: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        kill_and_resume.main(policy.parent, 30, seed=1)
    assert ended.value.code == 0
