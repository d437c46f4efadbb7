"""Tests of the value prior: a linear fit of reward models' prefix scores, used as the value's baseline."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_recipes.core.tensors import identity, length_mask
from rlhf_recipes.ppo.rollout.value_prior import ValuePrior, state_prefix_scores
from rlhf_recipes.scoring.functions import ScoresWithPrefixes
from rlhf_recipes.scoring.reward_models import ModelReward

Make = Callable[..., Any]
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
ANSWERS = [[20, 21, 22, 23], [24], [25, 26, 256]]
MASK = length_mask(torch.tensor([len(answer) for answer in ANSWERS]), 4)


@pytest.fixture(params=[1, 2], ids=["one label", "two labels"])
def reward_model(request: pytest.FixtureRequest, make_reward_model: Make, tokenizer: Any) -> ModelReward:
    model = make_reward_model(5, request.param, initializer_range=0.3)
    reward = ModelReward(model, tokenizer, tokenizer, "reward_model", 2, prefix_scores=True)
    reward.shift, reward.scale = 0.3, 1.7
    return reward


def scores_of(reward_model: ModelReward) -> list[float]:
    return reward_model([""] * 3, [""] * 3, prompt_ids=PROMPTS, completion_ids=ANSWERS)


def rollouts_of(trainer: Any) -> list[Any]:
    """Return a list to which the trainer will add each rollout that it trains on."""
    rollouts: list[Any] = []
    begin = trainer._begin_update
    trainer._begin_update = lambda *args: rollouts.append(begin(*args)) or rollouts[-1]
    return rollouts


def test_prefix_scores_match_scoring_each_prefix(reward_model: ModelReward) -> None:
    """Scoring each prefix as a text gives its prefix score; computing prefix scores changes no score."""
    scores = scores_of(reward_model)
    prefix_scores = state_prefix_scores({"reward": scores}, [0.5], MASK)
    assert prefix_scores is not None and prefix_scores.shape == MASK.shape
    reward_model.prefix_scores = False
    assert scores_of(reward_model) == pytest.approx(scores, abs=1e-6)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        for position in range(len(answer)):
            (score,) = reward_model.score_ids([[*prompt, *answer[:position]]])
            assert prefix_scores[row, position].item() == pytest.approx(0.5 * score, abs=1e-5)


def test_prefix_scores_of_several_rewards_are_a_weighted_sum(reward_model: ModelReward) -> None:
    scores = scores_of(reward_model)
    one = state_prefix_scores({"a": scores}, None, MASK)
    both = state_prefix_scores({"a": scores, "function": [0.0] * 3, "b": scores}, [2.0, 1.0, -0.5], MASK)
    assert one is not None and both is not None and torch.allclose(both, 1.5 * one)
    assert state_prefix_scores({"a": scores, "b": [0.0] * 3}, [0.0, 1.0], MASK) is None, "a reward of weight 0"


def test_value_prior_is_the_least_squares_line_of_all_tokens_so_far() -> None:
    generator = torch.Generator().manual_seed(0)
    value_prior = ValuePrior()
    rows = []
    for batch in (5, 7):
        prefix_scores, noise = torch.randn(batch, 6, generator=generator), torch.randn(batch, generator=generator)
        mask = length_mask(torch.randint(1, 7, (batch,), generator=generator), 6)
        scores = noise + prefix_scores.mean(1)
        value_prior.fit(prefix_scores, scores, mask, identity)
        rows += [(prefix_scores[row, position].item(), scores[row].item()) for row, position in mask.nonzero()]
    points = torch.tensor(rows, dtype=torch.float64)
    design = torch.stack([torch.ones(len(points), dtype=torch.float64), points[:, 0]], dim=1)
    offset, slope = torch.linalg.lstsq(design, points[:, 1:]).solution.flatten()
    x = torch.tensor([[-2.0, 0.0, 3.0]])
    assert torch.allclose(value_prior(x).double(), offset + slope * x.double(), atol=1e-6)


@pytest.mark.parametrize("case", ["negatively correlated", "all equal"])
def test_prefix_scores_that_do_not_predict_the_score_give_a_constant(case: str) -> None:
    scores, value_prior = torch.tensor([1.0, 2.0, 4.0, 5.0]), ValuePrior()
    prefix_scores = -scores[:, None] if case != "all equal" else torch.full((4, 1), 0.7)
    value_prior.fit(prefix_scores, scores, torch.ones(4, 1, dtype=torch.bool), identity)
    assert torch.allclose(value_prior(torch.tensor([[-9.0, 0.0, 9.0]])), torch.full((1, 3), 3.0))


def test_value_prior_is_fitted_over_all_processes() -> None:
    x, scores, mask = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([2.0, 2.5, 9.0]), torch.ones(3, 1).bool()
    together, first, second = ValuePrior(), ValuePrior(), ValuePrior()
    together.fit(x, scores, mask, identity)
    second.fit(x[1:], scores[1:], mask[1:], identity)
    first.fit(x[:1], scores[:1], mask[:1], lambda sums: sums + second.sums)
    assert torch.equal(first.sums, together.sums)


def test_values_of_the_first_update_equal_the_baseline(make_trainer: Make, make_reward_model: Make) -> None:
    """A new head returns 0, so the values equal the baseline; the value loss then trains the head."""
    reward_model = make_reward_model(5, initializer_range=0.3)
    trainer = make_trainer(
        reward_funcs=reward_model, rows=8, num_ppo_epochs=1, response_length=6, value_learning_rate=1e-2
    )
    rollouts = rollouts_of(trainer)
    trainer.train()
    first = rollouts[0]
    mask = first.response_mask
    assert torch.equal(first.values[mask], first.baseline[mask]) and not first.baseline[~mask].any()
    scores = first.scores.double()[:, None].expand(mask.shape)[mask]
    residual = scores - first.baseline.double()[mask]
    assert residual.mean().abs() < 1e-6  # a property of the least squares fit
    assert residual.square().mean() <= (scores - scores.mean()).square().mean() + 1e-9
    assert trainer.model.value_model.score.weight.abs().max() > 0


@pytest.mark.parametrize("case", ["turned off", "a value model", "a function", "weight 0"])
def test_no_baseline_without_prefix_scores(case: str, make_trainer: Make, make_reward_model: Make) -> None:
    options: dict[str, Any] = {"reward_funcs": make_reward_model(5), "rows": 8, "num_ppo_epochs": 1}
    options |= {
        "turned off": {"value_prior": False},
        "a value model": {"value_model": make_reward_model(6)},
        "a function": {"reward_funcs": lambda completions, **columns: [0.0] * len(completions)},
        "weight 0": {
            "reward_funcs": [make_reward_model(5), lambda completions, **columns: [0.0] * len(completions)],
            "reward_weights": [0.0, 1.0],
        },
    }[case]
    trainer = make_trainer(**options)
    rollouts = rollouts_of(trainer)
    trainer.train()
    assert rollouts and all(rollout.baseline is None for rollout in rollouts)


def test_no_baseline_when_score_is_overridden(make_trainer: Make, make_reward_model: Make) -> None:
    """Prefix scores of earlier answers are not used for answers that an overridden `score` scored."""
    from rlhf_recipes.ppo.trainer import PPOTrainer

    class LengthScore(PPOTrainer):
        def score(self, rows: Any, completions: Any) -> dict[str, Any]:
            return {"length": [float(len(ids)) for ids in completions.ids]}

    trainer = make_trainer(trainer_class=LengthScore, reward_funcs=make_reward_model(5), rows=8, num_ppo_epochs=1)
    rollouts = rollouts_of(trainer)
    trainer.train()
    assert rollouts and all(rollout.baseline is None for rollout in rollouts)


def test_truncated_rows_keep_the_available_prefix_scores() -> None:
    scores = ScoresWithPrefixes([3.0], [torch.tensor([1.0, 2.0, 3.0])])
    prefix_scores = state_prefix_scores({"reward": scores}, None, torch.ones(1, 4, dtype=torch.bool))
    assert prefix_scores is not None and prefix_scores.tolist() == [[0.0, 0.0, 1.0, 2.0]]


def test_reward_model_with_a_last_token_head_has_no_prefix_scores(make_reward_model: Make, tokenizer: Any) -> None:
    model = make_reward_model(5)
    model.score.register_forward_hook(lambda module, inputs, logits: logits[:, -1])
    reward_model = ModelReward(model, tokenizer, tokenizer, prefix_scores=True)
    reward_model.model.forward = lambda input_ids, attention_mask: SimpleNamespace(
        logits=model.score(model.transformer(input_ids).last_hidden_state)
    )
    assert state_prefix_scores({"reward": scores_of(reward_model)}, None, MASK) is None


def test_prefix_scores_of_eval_answers_are_not_used_by_step(make_trainer: Make, make_reward_model: Make) -> None:
    trainer = make_trainer(reward_funcs=make_reward_model(5), rows=8, eval_dataset=[{"prompt": "a"}] * 8)
    rollouts = rollouts_of(trainer)
    trainer.evaluate()
    trainer.step([[5, 6]] * 8, [[7, 8, 9]] * 8, [1.0] * 8)
    assert [rollout.baseline for rollout in rollouts] == [None]


def test_prefix_scores_of_training_answers_are_not_used_by_step(make_trainer: Make, make_reward_model: Make) -> None:
    trainer = make_trainer(reward_funcs=make_reward_model(5), rows=8, max_steps=4)
    rollouts = rollouts_of(trainer)
    trainer.train()
    sums = trainer.collector.value_prior.sums.clone()
    trainer.step([[5, 6]] * 8, [[7, 8, 9]] * 8, [1.0] * 8)
    assert [rollout.baseline is None for rollout in rollouts] == [False, True]
    assert torch.equal(trainer.collector.value_prior.sums, sums)
