"""Tests of training: optimizer steps, seeds, and the options, schedules and callbacks of Trainer."""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

Make = Callable[..., Any]
Weights = dict[str, torch.Tensor]


class Watcher(TrainerCallback):
    """Count the events of Trainer, record the weights after each step, and stop training at `stop_at`."""

    def __init__(self, model: Any = None, stop_at: int | None = None) -> None:
        self.calls: dict[str, int] = {}
        self.model, self.stop_at = model, stop_at
        self.weights: list[Weights] = []

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("train_begin")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("epoch_end")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("step_begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("step_end")
        if self.model is not None:
            self.weights.append({name: tensor.detach().clone() for name, tensor in self.model.named_parameters()})
        if state.global_step == self.stop_at:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("log")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("train_end")


def logged(trainer: Any, name: str) -> dict[int, float]:
    """Return {optimizer step: logged value} of a metric."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


SHAPES = [  # per-device batch, accumulation, minibatches, passes, prompts, epochs
    (8, 1, 1, 2, 16, 1),
    (8, 1, 2, 3, 16, 1),
    (2, 4, 1, 2, 19, 1),
    (2, 4, 4, 1, 17, 2),
    (4, 2, 8, 1, 8, 2),
    (3, 2, 3, 2, 13, 1),
    (1, 6, 2, 2, 7, 1),
]


@pytest.mark.parametrize(("batch", "accumulation", "mini_batches", "passes", "prompts", "epochs"), SHAPES)
def test_optimizer_steps_per_update_are_epochs_times_minibatches(
    make_trainer: Make, recorder: type, batch: int, accumulation: int, mini_batches: int, passes: int, prompts: int,
    epochs: int,
) -> None:  # fmt: skip
    """Count the optimizer's steps between rollouts, also for a dataset that does not fill the last update."""
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(
        None, rows=prompts, trainer_class=recorder, num_mini_batches=mini_batches, num_ppo_epochs=passes, response_length=3,
        num_train_epochs=epochs, **sizes,
    )  # fmt: skip
    steps: list[int] = []  # for each optimizer step, the number of its rollout
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(len(trainer.generated)))
    trainer.train()
    updates = epochs * math.ceil(prompts / (batch * accumulation))
    assert steps == [1 + index // (passes * mini_batches) for index in range(updates * passes * mini_batches)]
    assert trainer.state.global_step == trainer.state.max_steps == len(steps)
    assert all(len(queries) == batch * accumulation for _, queries, _ in trainer.generated)
    prompt_ids = [tuple(query) for _, queries, _ in trainer.generated for query in queries]
    per_epoch = len(prompt_ids) // epochs
    for epoch in range(epochs):
        assert len(set(prompt_ids[epoch * per_epoch : (epoch + 1) * per_epoch])) == prompts, (
            "every prompt in every epoch"
        )


@pytest.mark.parametrize("mini_batches", [1, 2, 8])
def test_gradient_accumulation_changes_no_weight(
    make_trainer: Make, weights_of: Make, max_difference: Make, mini_batches: int
) -> None:
    """Batch size x accumulation of 8 x 1, 2 x 4 and 4 x 2, with answers of different lengths, over two updates."""
    weights = []
    for batch, accumulation in ((8, 1), (2, 4), (4, 2)):
        trainer = make_trainer(
            num_mini_batches=mini_batches, per_device_train_batch_size=batch, num_ppo_epochs=2, vf_coef=0.5,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        before = weights_of(trainer.model)
        trainer.train()
        weights.append(weights_of(trainer.model))
        assert max_difference(before, weights[-1]) > 1e-3
    assert max(max_difference(weights[0], other) for other in weights[1:]) < 1e-5


def test_the_same_seed_gives_identical_weights(make_trainer: Make, weights_of: Make) -> None:
    weights, losses = [], []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        trainer = make_trainer(seed=seed, num_mini_batches=2, num_ppo_epochs=2)
        trainer.train()
        weights.append(weights_of(trainer.model))
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses[0] != losses[2] and any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_train_returns_train_output(make_trainer: Make) -> None:
    trainer = make_trainer(num_ppo_epochs=2)
    output = trainer.train()
    assert isinstance(output, TrainOutput) and output.global_step == trainer.state.global_step == 4
    assert output.training_loss == pytest.approx(sum(logged(trainer, "loss").values()) / 4, abs=1e-7)
    assert {"train_runtime", "train_loss", "epoch"} <= output.metrics.keys() and output.metrics["epoch"] == 1.0


@pytest.mark.parametrize(("max_grad_norm", "clips"), [(0.05, True), (1e6, False)])
def test_max_grad_norm_clips_and_the_unclipped_norm_is_logged(
    make_trainer: Make, max_grad_norm: float, clips: bool
) -> None:
    """With SGD at learning rate 1 a step is as long as the clipped gradient; the log has the norm before clipping."""
    trainer = make_trainer(max_grad_norm=max_grad_norm, num_ppo_epochs=3, rows=8, learning_rate=1.0)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    watcher = Watcher(trainer.model)
    start = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    trainer.add_callback(watcher)
    trainer.train()
    norms = logged(trainer, "grad_norm")
    weights = [start, *watcher.weights]
    assert set(norms) == {1, 2, 3}
    for step, norm in norms.items():
        changes = [(weights[step][name] - weights[step - 1][name]).double().norm() for name in start]
        length = torch.stack(changes).norm().item()
        assert length == pytest.approx(min(norm, max_grad_norm), rel=1e-3)
        assert (norm > max_grad_norm) is clips


def test_gradient_checkpointing_changes_no_number(
    make_trainer: Make, make_reward_model: Make, weights_of: Make
) -> None:
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            gradient_checkpointing=checkpointing, value_model=make_reward_model(2), num_ppo_epochs=2
        )
        forwards: list[int] = []
        for model in (trainer.model.policy, trainer.model.value_model):
            attention = model.transformer.h[0].attn.c_attn
            attention.register_forward_hook(lambda *_, calls=forwards: calls.append(1))
        trainer.train()
        runs.append((weights_of(trainer.model), logged(trainer, "loss"), len(forwards)))
    (plain, plain_losses, plain_forwards), (checkpointed, losses, forwards_with_checkpointing) = runs
    assert plain_losses == losses
    assert forwards_with_checkpointing == plain_forwards + 4 + 4, "one more for each of the four steps, in both models"
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("options", [{}, {"bf16": False}])
def test_default_bf16_depends_on_hardware_and_model(
    options: dict[str, Any],
    make_trainer: Make,
    make_policy: Make,
    make_reward_model: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(import_module("rlhf_recipes.system.hardware"), "bf16_support", lambda: "unit")
    trainer = make_trainer(make_policy(0, n_embd=256), reward_funcs=make_reward_model(5), **options)
    assert trainer.args.bf16 is (not options)
    assert trainer.accelerator.mixed_precision == ("no" if options else "bf16")
    narrow = make_trainer(**options)
    assert narrow.accelerator.mixed_precision == "no"


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(make_trainer: Make, weights_of: Make) -> None:
    trainer = make_trainer(bf16=True, num_ppo_epochs=2)
    dtypes = set()
    trainer.model.policy.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
    before = weights_of(trainer.model)
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in trainer.model.parameters()} == {torch.float32}
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss").values())
    assert any(not torch.equal(before[name], after) for name, after in weights_of(trainer.model).items())


@pytest.mark.parametrize(("max_steps", "rollouts"), [(3, 1), (4, 1), (6, 2)])
def test_max_steps_counts_optimizer_steps(make_trainer: Make, recorder: type, max_steps: int, rollouts: int) -> None:
    trainer = make_trainer(max_steps=max_steps, num_mini_batches=2, num_ppo_epochs=2, rows=16, trainer_class=recorder)
    assert trainer.train().global_step == max_steps
    assert len(trainer.generated) == rollouts
    assert max(logged(trainer, "objective/kl")) == max_steps, "the last rollout is logged"


@pytest.mark.parametrize(("total_episodes", "steps"), [(8, 2), (24, 6), (25, 8)])
def test_total_episodes_are_rounded_up_to_updates(make_trainer: Make, total_episodes: int, steps: int) -> None:
    trainer = make_trainer(total_episodes=total_episodes, num_ppo_epochs=2, rows=16)
    assert trainer.train().global_step == steps
    assert max(logged(trainer, "episode").values()) == 8 * -(-total_episodes // 8)


@pytest.mark.parametrize("logging_steps", [1, 3, 100])
def test_first_and_last_rollout_are_logged_for_any_logging_steps(make_trainer: Make, logging_steps: int) -> None:
    trainer = make_trainer(logging_steps=logging_steps, num_mini_batches=2, num_ppo_epochs=2, rows=40)
    trainer.train()
    assert set(logged(trainer, "loss")) == {4, 20} | set(range(logging_steps, 21, logging_steps))
    assert {4, 20} <= logged(trainer, "objective/scores").keys()
    episodes = logged(trainer, "episode")
    assert episodes[4] == 8 and episodes[20] == 40


def test_metrics_of_updates_between_logs_are_averaged(make_trainer: Make) -> None:
    often, rarely = make_trainer(logging_steps=2, rows=48), make_trainer(logging_steps=8, rows=48)
    for trainer in (often, rarely):
        trainer.args.num_ppo_epochs = 2
        trainer.train()
    for name in ("objective/scores", "policy/approxkl_avg", "val/ratio", "loss/value_avg"):
        values, means = logged(often, name), logged(rarely, name)
        assert set(values) == {2, 4, 6, 8, 10, 12} and set(means) == {2, 8, 12}
        assert means[8] == pytest.approx(sum(values[step] for step in (4, 6, 8)) / 3, abs=1e-9)
    assert logged(rarely, "loss")[8] == pytest.approx(
        sum(logged(often, "loss")[step] for step in (4, 6, 8)) / 3, abs=1e-7
    )


def test_save_steps_and_save_total_limit(make_trainer: Make, tmp_path: Path) -> None:
    watcher = Watcher()
    trainer = make_trainer(
        save_strategy="steps", save_steps=3, save_total_limit=2, num_ppo_epochs=3, rows=32, callbacks=[watcher]
    )
    trainer.train()
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}
    assert watcher.calls["save"] == 4


def test_callbacks_receive_every_event(make_trainer: Make) -> None:
    watcher = Watcher()
    trainer = make_trainer(callbacks=[watcher], num_ppo_epochs=3, num_train_epochs=2, logging_steps=2)
    trainer.train()
    expected = {"train_begin": 1, "epoch_end": 2, "step_begin": 12, "step_end": 12, "train_end": 1}
    assert {name: watcher.calls[name] for name in expected} == expected
    assert watcher.calls["log"] == len(trainer.state.log_history)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_callback_can_stop_training(make_trainer: Make, stop_at: int) -> None:
    """In the middle or at the end of an update; the metrics until then are logged."""
    trainer = make_trainer(callbacks=[Watcher(stop_at=stop_at)], num_ppo_epochs=2, rows=64, logging_steps=100)
    assert trainer.train().global_step == stop_at
    assert max(logged(trainer, "objective/scores")) == stop_at


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        ("linear", lambda step: 1e-3 * (step / 2 if step < 2 else (8 - step) / 6)),
        ("cosine", lambda step: 1e-3 * (step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 6)))),
        ("constant_with_warmup", lambda step: 1e-3 * min(1.0, step / 2)),
    ],
)
def test_learning_rate_schedule_counts_optimizer_steps(make_trainer: Make, schedule: str, rate: Any) -> None:
    trainer = make_trainer(lr_scheduler_type=schedule, warmup_steps=2, num_ppo_epochs=2, num_mini_batches=2)
    trainer.train()
    rates = logged(trainer, "learning_rate")
    assert set(rates) == set(range(1, 9))
    for step, value in rates.items():
        assert value == pytest.approx(rate(step - 1), abs=1e-12) or value == pytest.approx(rate(step), abs=1e-12)
    assert logged(trainer, "lr") == {step: rates[step] for step in (4, 8)}
