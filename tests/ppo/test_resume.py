"""Tests of resuming: killed and resumed runs match the uninterrupted run. See programs/kill_and_resume.py."""

import os
import random
import shutil
import signal
import time
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
def uninterrupted(policy: Path) -> dict[str, Any]:
    """Return the results of the uninterrupted run of each case, and as `seconds` of all cases how long they took."""
    results: dict[str, Any] = {"seconds": {}}
    for case in kill_and_resume.CASES:
        started = time.monotonic()
        assert not forks.was_killed(lambda case=case: kill_and_resume.train(policy, policy.parent / case, case))
        results["seconds"][case] = time.monotonic() - started
        results[case] = kill_and_resume.saved_state(policy.parent / case)
    return results


@pytest.mark.parametrize("case", ["full", "upper", "lora"])
def test_runs_killed_at_random_match_the_uninterrupted_run(
    case: str, policy: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    draw, kills = random.Random(case), 0
    while kills == 0:  # a run may end before the moment that was drawn
        shutil.rmtree(tmp_path)
        longest = uninterrupted["seconds"][case]
        kills = kill_and_resume.killed_until_done(policy, tmp_path, case, draw, longest)
    assert small_runs.identical(kill_and_resume.saved_state(tmp_path), uninterrupted[case])


def kill_at_(owner: Any, name: str, call: int, truncate: bool) -> None:
    """Patch a function so that the process kills itself in call number `call`.

    truncate: the function writes a file, of which the first half is left.
    """
    function, calls = getattr(owner, name), 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return function(*args, **kwargs)
        if truncate:
            path = next(Path(value) for value in reversed(args) if isinstance(value, (str, Path)))
            function(*args, **kwargs)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, killing)


def kill_points() -> dict[str, tuple[Any, str, int, bool]]:
    """Return the arguments of `kill_at_` for each name in `KILL_POINTS`."""
    import torch
    from transformers import TrainerState

    from rlhf_recipes.ppo import resume as resuming
    from rlhf_recipes.ppo.logging import callbacks
    from rlhf_recipes.ppo.roles import value as value_head
    from rlhf_recipes.ppo.trainer import PPOTrainer
    from rlhf_recipes.training import trainer as safe_trainer

    return {
        "in generate": (PPOTrainer, "generate", 3, False),
        "in score": (PPOTrainer, "score", 4, False),
        "between minibatches": (PPOTrainer, "compute_loss", 13, False),
        "saving the value": (value_head, "save_file", 6, True),
        "saving the rollout": (resuming, "save_file", 5, True),
        "saving the optimizer": (torch, "save", 16, True),
        "saving the state": (TrainerState, "save_to_json", 7, True),
        "deleting an old checkpoint": (safe_trainer, "rotate_checkpoints", 7, False),
        "writing completions": (callbacks.CompletionsFile, "add", 3, False),
    }


KILL_POINTS = [
    "in generate", "in score", "between minibatches", "saving the value", "saving the rollout", "saving the optimizer",
    "saving the state", "deleting an old checkpoint", "writing completions",
]  # fmt: skip


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_run_killed_at_a_chosen_call_matches_the_uninterrupted_run(
    point: str, policy: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    def killed_run() -> None:
        kill_at_(*kill_points()[point])
        kill_and_resume.train(policy, tmp_path, "full")

    assert forks.was_killed(killed_run), "the run ended before the chosen call"
    assert not forks.was_killed(lambda: kill_and_resume.train(policy, tmp_path, "full"))
    assert small_runs.identical(kill_and_resume.saved_state(tmp_path), uninterrupted["full"])


@pytest.mark.slow
def test_thirty_random_kills_match_the_uninterrupted_run(policy: Path) -> None:
    with pytest.raises(SystemExit) as exited:
        kill_and_resume.main(policy.parent, 30, seed=1)
    assert exited.value.code == 0
