"""Tests that PPO learns: the score of a tiny model rises in a few updates, for several seeds and set-ups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import learning_matrix as matrix
import pytest

Make = Callable[..., Any]


def scores_of(trainer: Any) -> list[float]:
    """Train, and return the mean score of each update."""
    trainer.train()
    return [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]


@pytest.mark.parametrize("value", ["head", "model"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_score_rises_for_every_seed(
    make_trainer: Make, make_policy: Make, make_reward_model: Make, seed: int, value: str
) -> None:
    """Less than half of an untrained model's tokens have an id below 128; the reward is that share."""
    trainer = make_trainer(
        make_policy(seed, initializer_range=0.1), seed=seed, rows=32, per_device_train_batch_size=32, max_steps=64,
        num_mini_batches=2, response_length=5, learning_rate=1e-2,
        value_model=make_reward_model(seed + 10) if value == "model" else None,
    )  # fmt: skip
    scores = scores_of(trainer)
    assert len(scores) == 8 and scores[0] < 0.5
    assert sum(scores[-2:]) / 2 > max(0.6, scores[0] + 0.2), scores


def test_kl_penalty_keeps_the_policy_close_to_the_reference(make_trainer: Make) -> None:
    """With a large KL coefficient the KL and the score are lower."""
    options = {
        "rows": 32,
        "per_device_train_batch_size": 32,
        "max_steps": 32,
        "learning_rate": 5e-3,
        "response_length": 5,
    }
    free, penalized = (make_trainer(kl_coef=kl_coef, **options) for kl_coef in (0.0, 5.0))
    free_scores, penalized_scores = scores_of(free), scores_of(penalized)
    free_kl, penalized_kl = (trainer.state.log_history[-2]["objective/kl"] for trainer in (free, penalized))
    assert free_kl > 2 * abs(penalized_kl)
    assert free_scores[-1] > penalized_scores[-1]


@pytest.mark.parametrize("case", ["LoRA, value adapter", "reward from a reward model", "left-over generation_config"])
def test_score_rises_in_three_setups(case: str, tmp_path: Path) -> None:
    first, last = matrix.run(case, 0, tmp_path)
    assert last > first + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_score_rises_in_all_eight_setups(seed: int) -> None:
    scores = {case: matrix.launched(case, seed) for case in matrix.CASES}  # case -> first and last score
    assert len(scores) == 8 and all(last > first + 0.1 for first, last in scores.values()), scores
