"""The value's first guess: what the reward models read of an unfinished answer, and how far that is trusted."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_recipes.core.tensors import identity, length_mask
from rlhf_recipes.ppo.rollout.value_prior import ValuePrior
from rlhf_recipes.scoring.reward_models import ModelReward

Make = Callable[..., Any]
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
ANSWERS = [[20, 21, 22, 23], [24], [25, 26, 256]]
MASK = length_mask(torch.tensor([len(answer) for answer in ANSWERS]), 4)


@pytest.fixture(params=[1, 2], ids=["one label", "two labels"])
def reward_model(request: pytest.FixtureRequest, make_reward_model: Make, tokenizer: Any) -> ModelReward:
    reward = ModelReward(
        make_reward_model(5, request.param, initializer_range=0.3), tokenizer, tokenizer, "reward_model", 2
    )
    reward.shift, reward.scale = 0.3, 1.7
    return reward


def asked(reward_model: ModelReward) -> list[float]:
    return reward_model([""] * 3, [""] * 3, prompt_ids=PROMPTS, completion_ids=ANSWERS)


def test_a_reading_is_the_score_that_the_reward_model_gives_to_the_answer_so_far(reward_model: ModelReward) -> None:
    """Each beginning of an answer, scored by itself; and reading along changes no score."""
    plain = asked(reward_model)
    prior = ValuePrior([reward_model], [0.5], on=True)
    assert asked(reward_model) == pytest.approx(plain, abs=1e-6)
    readings = prior.readings(MASK)
    assert readings is not None and readings.shape == MASK.shape
    reward_model.reads_along = False
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        for place in range(len(answer)):
            (so_far,) = reward_model.score_ids([[*prompt, *answer[:place]]])
            assert readings[row, place].item() == pytest.approx(0.5 * so_far, abs=1e-5)


def test_the_line_is_that_of_least_squares_over_all_tokens_so_far() -> None:
    generator = torch.Generator().manual_seed(0)
    prior = ValuePrior([], None, on=True)
    rows = []
    for batch in (5, 7):
        readings, scores = torch.randn(batch, 6, generator=generator), torch.randn(batch, generator=generator)
        mask = length_mask(torch.randint(1, 7, (batch,), generator=generator), 6)
        prior.learn(readings, scores + readings.mean(1), mask, identity)
        rows += [
            (readings[row, place].item(), (scores + readings.mean(1))[row].item()) for row, place in mask.nonzero()
        ]
    points = torch.tensor(rows, dtype=torch.float64)
    design = torch.stack([torch.ones(len(points), dtype=torch.float64), points[:, 0]], dim=1)
    offset, slope = torch.linalg.lstsq(design, points[:, 1:]).solution.flatten()
    x = torch.tensor([[-2.0, 0.0, 3.0]])
    assert torch.allclose(prior(x).double(), offset + slope * x.double(), atol=1e-6)


@pytest.mark.parametrize("readings", ["the wrong way round", "all alike"])
def test_readings_that_do_not_tell_the_score_give_a_flat_line(readings: str) -> None:
    scores, prior = torch.tensor([1.0, 2.0, 4.0, 5.0]), ValuePrior([], None, on=True)
    read = -scores[:, None] if readings != "all alike" else torch.full((4, 1), 0.7)
    prior.learn(read, scores, torch.ones(4, 1, dtype=torch.bool), identity)
    assert torch.allclose(prior(torch.tensor([[-9.0, 0.0, 9.0]])), torch.full((1, 3), 3.0))


def test_sums_of_all_processes_make_one_line() -> None:
    whole, here = ValuePrior([], None, on=True), ValuePrior([], None, on=True)
    read, scores, mask = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([2.0, 2.5, 9.0]), torch.ones(3, 1).bool()
    whole.learn(read, scores, mask, identity)
    elsewhere = ValuePrior([], None, on=True)
    elsewhere.learn(read[1:], scores[1:], mask[1:], identity)
    here.learn(read[:1], scores[:1], mask[:1], lambda sums: sums + elsewhere.sums)
    assert torch.equal(here.sums, whole.sums)


def test_a_first_update_values_each_token_on_that_line(make_trainer: Make, make_reward_model: Make) -> None:
    """A new head says nothing, so the values are the prior; the loss is of their sum, so its gradient is the head's."""
    seen: list[Any] = []
    reward_model = make_reward_model(5, initializer_range=0.3)
    trainer = make_trainer(
        reward_funcs=reward_model, rows=8, num_ppo_epochs=1, response_length=6, value_learning_rate=1e-2
    )
    begin = trainer._begin_update
    trainer._begin_update = lambda *args: seen.append(begin(*args)) or seen[-1]
    trainer.train()
    first: Any = seen[0]
    mask = first.response_mask
    assert torch.equal(first.values[mask], first.prior[mask]) and not first.prior[~mask].any()
    scores = first.scores.double()[:, None].expand(mask.shape)[mask]
    residual = scores - first.prior.double()[mask]
    assert residual.mean().abs() < 1e-6  # as least squares leaves it
    assert residual.square().mean() <= (scores - scores.mean()).square().mean() + 1e-9
    assert trainer.model.value_model.score.weight.abs().max() > 0


@pytest.mark.parametrize("case", ["turned off", "a value model", "a function", "weight 0"])
def test_no_prior_where_there_is_nothing_to_start_from(case: str, make_trainer: Make, make_reward_model: Make) -> None:
    given: dict[str, Any] = {"reward_funcs": make_reward_model(5), "rows": 8, "num_ppo_epochs": 1}
    given |= {
        "turned off": {"value_prior": False},
        "a value model": {"value_model": make_reward_model(6)},
        "a function": {"reward_funcs": lambda completions, **columns: [0.0] * len(completions)},
        "weight 0": {
            "reward_funcs": [make_reward_model(5), lambda completions, **columns: [0.0] * len(completions)],
            "reward_weights": [0.0, 1.0],
        },
    }[case]
    trainer, rollouts = make_trainer(**given), []
    begin = trainer._begin_update
    trainer._begin_update = lambda *args: rollouts.append(begin(*args)) or rollouts[-1]
    trainer.train()
    assert rollouts and all(rollout.prior is None for rollout in rollouts)


def test_scores_that_a_subclass_makes_by_itself_have_no_prior(make_trainer: Make, make_reward_model: Make) -> None:
    """What the reward model read of other answers is not taken for readings of these."""
    from rlhf_recipes.ppo.trainer import PPOTrainer

    class Own(PPOTrainer):
        def score(self, rows: Any, completions: Any) -> dict[str, Any]:
            return {"own": [float(len(ids)) for ids in completions.ids]}

    trainer, rollouts = make_trainer(kind=Own, reward_funcs=make_reward_model(5), rows=8, num_ppo_epochs=1), []
    asked(trainer.rewards[0])  # three rows, of something else
    begin = trainer._begin_update
    trainer._begin_update = lambda *args: rollouts.append(begin(*args)) or rollouts[-1]
    trainer.train()
    assert rollouts and all(rollout.prior is None for rollout in rollouts)


def test_a_row_that_was_cut_keeps_the_readings_that_are_left() -> None:
    reward_model = SimpleNamespace(can_read_along=True, readings=[torch.tensor([1.0, 2.0, 3.0])])
    prior = ValuePrior([reward_model], None, on=True)
    readings: Tensor | None = prior.readings(torch.ones(1, 4, dtype=torch.bool))
    assert readings is not None and readings.tolist() == [[0.0, 0.0, 1.0, 2.0]]


def test_a_reward_model_whose_head_sees_only_the_end_has_no_readings(make_reward_model: Make, tokenizer: Any) -> None:
    model = make_reward_model(5)
    model.score.register_forward_hook(lambda module, given, logits: logits[:, -1])
    reward_model = ModelReward(model, tokenizer, tokenizer)
    prior = ValuePrior([reward_model], None, on=True)
    reward_model.model.forward = lambda input_ids, attention_mask: SimpleNamespace(
        logits=model.score(model.transformer(input_ids).last_hidden_state)
    )
    asked(reward_model)
    assert prior.readings(MASK) is None


def test_what_a_reward_model_read_of_held_out_answers_is_no_reading_of_others(
    make_trainer: Make, make_reward_model: Make
) -> None:
    trainer, rollouts = make_trainer(reward_funcs=make_reward_model(5), rows=8, eval_dataset=[{"prompt": "a"}] * 8), []
    begin = trainer._begin_update
    trainer._begin_update = lambda *args: rollouts.append(begin(*args)) or rollouts[-1]
    trainer.evaluate()
    trainer.step([[5, 6]] * 8, [[7, 8, 9]] * 8, [1.0] * 8)
    assert [rollout.prior for rollout in rollouts] == [None]


def test_what_a_reward_model_read_of_the_last_answers_is_no_reading_of_the_callers(
    make_trainer: Make, make_reward_model: Make
) -> None:
    trainer, rollouts = make_trainer(reward_funcs=make_reward_model(5), rows=8, max_steps=4), []
    begin = trainer._begin_update
    trainer._begin_update = lambda *args: rollouts.append(begin(*args)) or rollouts[-1]
    trainer.train()
    seen = trainer.experience.prior.sums.clone()
    trainer.step([[5, 6]] * 8, [[7, 8, 9]] * 8, [1.0] * 8)
    assert [rollout.prior is None for rollout in rollouts] == [False, True]
    assert torch.equal(trainer.experience.prior.sums, seen)
