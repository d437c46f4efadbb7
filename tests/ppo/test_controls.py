"""Tests of the control options, which are off by default, of overridden methods and of `step`."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_recipes.generation.sampling import Completions
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.rollout.rewards import KLCoefficient, ScoreScale
from rlhf_recipes.ppo.trainer import PPOTrainer

Make = Callable[..., Any]


def updates_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "objective/kl" in entry]


def test_control_options_are_off_by_default() -> None:
    config = PPOConfig(output_dir="unused")
    defaults = {
        "target_kl": None, "adaptive_kl_target": None, "use_score_scaling": False, "use_score_norm": False,
        "reward_clip_range": None, "entropy_coef": 0.0, "value_learning_rate": None, "value_warmup_updates": 0,
        "generation_kwargs": None, "normalize_rewards": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in defaults} == defaults


def test_target_kl_stops_an_update_at_the_first_step_above_the_limit(make_trainer: Make, recorder: type) -> None:
    """From the first step with a KL above 1.5 times the target to the end of the update, no weight changes."""
    free = make_trainer(trainer_class=recorder, num_mini_batches=2, learning_rate=3e-3)
    free.train()
    divergences = [mean_kl(step) for step in free.steps]
    first = max(step for step in range(1, 7) if divergences[step] > 1.2 * max(divergences[:step]))
    target = max(divergences[:first]) * 0.8  # an earlier step exceeds the target, but not 1.5 times the target
    limited = make_trainer(trainer_class=recorder, num_mini_batches=2, learning_rate=3e-3, target_kl=target)
    limited.train()
    assert first == next(step for step, divergence in enumerate(divergences) if divergence > 1.5 * target) > 1
    steps = [step.optimizer_step for step in limited.steps]
    assert [step for step in steps if step < 8] == list(range(first + 1)), (
        "the loss of this step is computed, of the following ones not"
    )
    assert 8 in steps, "the next update trains again"
    for index in range(first + 1):
        assert all(map(torch.equal, weights(limited.steps[index].model), weights(free.steps[index].model)))
    after = next(step.model for step in limited.steps if step.optimizer_step == 8)
    assert all(map(torch.equal, weights(after), weights(limited.steps[first].model))), "no weight has changed since"


def mean_kl(step: Any) -> float:
    """Return the mean of log(ratio)^2 / 2 over the tokens of a recorded step."""
    mask = step.inputs["response_mask"]
    return ((step.outputs.log_probs - step.inputs["log_probs"])[mask].double() ** 2 / 2).mean().item()


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def test_adaptive_kl_coefficient_follows_ziegler() -> None:
    """By hand: KL 8 at target 4 is an error of 1, clipped to 0.2; KL 3.6 is an error of -0.1."""
    coefficient = KLCoefficient(0.1, target=4.0, horizon=1000)
    coefficient.update(8.0, 100)
    assert coefficient.value == pytest.approx(0.1 * 1.02)
    coefficient.update(3.6, 100)
    assert coefficient.value == pytest.approx(0.1 * 1.02 * 0.99)


def test_adaptive_kl_coefficient_weights_the_kl_penalty(make_trainer: Make, recorder: type) -> None:
    trainer = make_trainer(
        trainer_class=recorder,
        rows=32,
        adaptive_kl_target=0.05,
        adaptive_kl_horizon=20,
        kl_coef=0.3,
        learning_rate=3e-3,
    )
    trainer.train()
    entries, coefficient = updates_of(trainer), 0.3
    rollouts = {step.optimizer_step // 4: step.inputs for step in trainer.steps}
    for number, entry in enumerate(entries):
        assert entry["objective/kl_coef"] == pytest.approx(coefficient)
        inputs = rollouts[number]
        penalties = inputs["rewards"].clone()
        last = inputs["response_mask"].sum(1) - 1
        penalties[torch.arange(len(last)), last] -= inputs["scores"]
        torch.testing.assert_close(penalties, -coefficient * inputs["kl"], atol=1e-6, rtol=1e-5)
        coefficient *= 1 + max(-0.2, min(0.2, entry["objective/kl"] / 0.05 - 1)) * 8 / 20
    assert len(entries) == 4 and entries[-1]["objective/kl_coef"] != 0.3


@pytest.mark.parametrize("shift", [False, True])
def test_scores_are_scaled_by_statistics_of_all_scores_so_far(shift: bool) -> None:
    """Compare each batch with NumPy over all scores so far, clipped to the range."""
    draw = np.random.default_rng(0)
    scale, all_scores = ScoreScale(True, shift, (-1.0, 1.5)), np.array([])
    for size in (4, 1, 7):
        batch = draw.normal(5.0, 3.0, size)
        all_scores = np.concatenate([all_scores, batch])
        expected = (batch - (all_scores.mean() if shift else 0.0)) / all_scores.std(ddof=1)
        scaled = scale(torch.tensor(batch, dtype=torch.float64))
        np.testing.assert_allclose(scaled.numpy(), expected.clip(-1.0, 1.5), rtol=1e-10)
    before = scale.state()
    scale(torch.tensor([100.0]), update=False)
    assert scale.state() == before, "evaluation does not change the statistics"


def test_equal_scores_are_not_scaled() -> None:
    assert ScoreScale(True)(torch.tensor([-1.0, -1.0, -1.0])).tolist() == [-1.0, -1.0, -1.0]


def test_training_uses_the_scaled_scores(make_trainer: Make, recorder: type) -> None:
    trainer = make_trainer(
        trainer_class=recorder, use_score_scaling=True, use_score_norm=True, reward_clip_range=[-0.5, 0.5]
    )
    trainer.train()
    raw = np.array(trainer.scored[0]["low_share"])
    expected = ((raw - raw.mean()) / raw.std(ddof=1)).clip(-0.5, 0.5)
    assert trainer.steps[0].inputs["scores"].sort().values.numpy() == pytest.approx(np.sort(expected), abs=1e-6)
    assert updates_of(trainer)[0]["rewards/low_share"] == pytest.approx(raw.mean()), "the log has the unscaled score"


def test_entropy_bonus_has_the_gradient_of_the_entropy(make_trainer: Make, recorder: type) -> None:
    """Loss and gradient differ by the coefficient times the mean entropy of an independent softmax."""
    trainer = make_trainer(trainer_class=recorder, entropy_coef=0.7, num_ppo_epochs=1, learning_rate=0.0)
    trainer.train()
    step = trainer.steps[0]
    inputs, mask = step.inputs, step.inputs["response_mask"]
    plain = make_trainer(trainer_class=recorder, num_ppo_epochs=1, learning_rate=0.0)
    plain.train()
    entropies = entropies_of(step.model.policy, inputs, trainer.args.temperature)
    assert plain.steps[0].loss - step.loss == pytest.approx(0.7 * entropies[mask].mean().item(), rel=1e-4)
    (-0.7 * entropies[mask].mean()).backward()
    expected = step.model.policy.transformer.wpe.weight.grad
    gradients = [gradient(run, inputs) for run in (trainer, plain)]
    torch.testing.assert_close((gradients[0] - gradients[1]).double(), expected, atol=1e-5, rtol=1e-3)


def entropies_of(policy: Any, inputs: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """Return entropies (batch, tokens) from a forward pass for each row; zero after its answer."""
    entropies = torch.zeros(inputs["response_mask"].shape, dtype=torch.float64)
    for row, (ids, attention, mask) in enumerate(
        zip(inputs["input_ids"], inputs["attention_mask"], inputs["response_mask"], strict=True)
    ):
        tokens = int(mask.sum())
        logits = policy(input_ids=ids[attention.bool()][None]).logits[0, -tokens - 1 : -1] / temperature
        probabilities = logits.softmax(-1)
        entropies[row, :tokens] = -(probabilities * probabilities.log()).sum(-1)
    return entropies


def gradient(trainer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, inputs).backward()
    return trainer.model.policy.transformer.wpe.weight.grad.clone()


def test_value_learning_rate_applies_to_value_parameters_only(make_trainer: Make, weights_of: Make) -> None:
    trainer = make_trainer(learning_rate=1e-3, value_learning_rate=5e-2, lr_scheduler_type="linear")
    before = weights_of(trainer.model)
    trainer.train()
    groups = trainer.optimizer.param_groups
    rates = {id(weight): group["initial_lr"] for group in groups for weight in group["params"]}
    assert len(rates) == len(list(trainer.model.parameters()))
    value = {id(weight) for weight in trainer.model.value_model.parameters()}
    assert {rate for key, rate in rates.items() if key in value} == {5e-2}
    assert {rate for key, rate in rates.items() if key not in value} == {1e-3}
    assert not torch.equal(before["value_model.score.weight"], trainer.model.value_model.score.weight)


@pytest.mark.parametrize("separate", [False, True])
def test_value_warmup_leaves_the_policy_unchanged(
    separate: bool, make_trainer: Make, make_reward_model: Make, recorder: type, weights_of: Make
) -> None:
    """Bit for bit, also with weight decay; after the warm-up the policy is trained."""
    options = {"value_model": make_reward_model(4)} if separate else {}
    trainer = make_trainer(trainer_class=recorder, rows=24, value_warmup_updates=2, weight_decay=0.1, **options)
    start = {name: weight.double() for name, weight in weights_of(trainer.model).items()}
    trainer.train()
    for number in range(3):
        model = next(step.model for step in trainer.steps if step.optimizer_step == 4 * number)
        weights = weights_of(model)
        assert all(torch.equal(weights[name], start[name]) for name in start if name.startswith("policy."))
        assert number == 0 or not torch.equal(weights["value_model.score.weight"], start["value_model.score.weight"])
    end = weights_of(trainer.model)
    assert any(not torch.equal(end[name].double(), start[name]) for name in start if name.startswith("policy."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_kl": 0.0}, "target_kl is 0.0; it must be above 0"),
        ({"adaptive_kl_target": -1.0}, "adaptive_kl_target is -1.0"),
        ({"reward_clip_range": [1.0]}, "give the lower and the upper bound"),
        ({"reward_clip_range": [1.0, -1.0]}, "give the lower and the upper bound"),
        ({"use_score_norm": True}, "use_score_norm needs use_score_scaling"),
        ({"fp16": True}, "use bf16"),
        ({"value_warmup_updates": -1}, "it must be at least 0"),
        ({"generation_kwargs": {"num_beams": 4}}, "has unknown keys \\(num_beams\\); it accepts top_k, top_p, min_p"),
    ],
)
def test_invalid_control_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(output_dir="unused", **options)


def test_generation_kwargs_restrict_sampling_but_not_log_probs(make_trainer: Make, recorder: type) -> None:
    trainer = make_trainer(
        trainer_class=recorder, generation_kwargs={"top_k": 1, "min_new_tokens": 4}, learning_rate=0.0
    )
    trainer.train()
    model, queries, completions = trainer.generated[0]
    for query, answer in zip(queries, completions.ids, strict=True):
        ids = list(query)
        for position, token in enumerate(answer):
            logits = model.policy(torch.tensor([ids])).logits[0, -1].detach()
            if position < 4:
                logits[list(trainer.sampling.stop_ids)] = -math.inf
            assert token == logits.argmax()
            ids.append(token)
    assert min(map(len, completions.ids)) >= 4
    assert updates_of(trainer)[0]["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert updates_of(trainer)[0]["objective/entropy"] > 4.0, "the entropy of the full distribution"


def test_a_subclass_can_override_generate_and_score(make_trainer: Make, recorder: type) -> None:
    class Overridden(recorder):  # type: ignore[valid-type, misc]
        def generate(self, queries: Any, seeds: Any) -> Completions:
            return Completions([[len(query) % 200, 200] for query in queries], [True] * len(queries))

        def score(self, rows: Any, completions: Completions) -> dict[str, list[float]]:
            return {"first_token": [float(ids[0]) for ids in completions.ids]}

    trainer = make_trainer(trainer_class=Overridden)
    trainer.train()
    inputs = trainer.steps[0].inputs
    lengths = inputs["attention_mask"].sum(1) - 2
    assert torch.equal(inputs["scores"], lengths.float())
    ends = [ids[length : length + 2] for ids, length in zip(inputs["input_ids"], lengths, strict=True)]
    assert torch.equal(torch.stack(ends), torch.stack([lengths, torch.full_like(lengths, 200)], 1))
    assert updates_of(trainer)[0]["rewards/first_token"] == pytest.approx(lengths.float().mean().item())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_step_matches_one_training_update(
    accumulation: int, make_trainer: Make, recorder: type, weights_of: Make
) -> None:
    """Two updates on the same episodes by train() and by step() give the same weights and metrics."""
    options = {
        "per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation, "max_steps": 8,
        "lr_scheduler_type": "linear", "num_mini_batches": 1, "weight_decay": 0.01, "adaptive_kl_target": 0.1,
    }  # fmt: skip
    trained = make_trainer(trainer_class=recorder, **options)
    trained.train()
    stepped = make_trainer(None, None, None, **options)
    for number, entry in enumerate(updates_of(trained)):
        _, queries, completions = trained.generated[number]
        tensors = [torch.tensor(ids) for ids in completions.ids]
        metrics = stepped.step(queries, tensors, trained.scored[number]["low_share"])
        for name in ("objective/kl", "objective/scores", "policy/approxkl_avg", "loss/value_avg", "objective/kl_coef"):
            assert metrics[name] == pytest.approx(entry[name], abs=1e-9)
    expected, weights = weights_of(trained.model), weights_of(stepped.model)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    with pytest.raises(ValueError, match="step got 1 queries, 1 responses and 1 scores; an update takes 8 of each"):
        stepped.step([[1]], [[2]], [0.0])
    with pytest.raises(ValueError, match="only step\\(\\) can be called"):
        stepped.train()


def test_step_needs_max_steps_unless_the_learning_rate_is_constant(make_trainer: Make) -> None:
    episodes: Any = [[1]] * 8, [[5, 200]] * 8, [float(row) for row in range(8)]
    with pytest.raises(ValueError, match="needs the number of steps of your loop"):
        make_trainer(None, None, None, lr_scheduler_type="linear").step(*episodes)
    trainer = make_trainer(None, None, None, num_train_epochs=1)
    rates = [trainer.step(*episodes) and trainer.lr_scheduler.get_last_lr()[0] for _ in range(4)]
    assert rates == [1e-3] * 4
    trainer = make_trainer(None, None, None)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.25)
    trainer = make_trainer(trainer.model.policy, None, None, optimizers=(optimizer, None))
    trainer.step(*episodes)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


def test_a_step_only_trainer_needs_no_rewards_and_no_prompts(make_trainer: Make) -> None:
    trainer = make_trainer(None, None, None)
    assert isinstance(trainer, PPOTrainer) and trainer.prompts is None
