"""Tests of frozen lower layers, kept casts and split minibatches: they speed up an update and change no result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rlhf_recipes.core.errors import UserError

Make = Callable[..., Any]
ADAPTER: dict[str, Any] = {
    "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True,
}  # fmt: skip


def freeze_all_but_the_last_layer_(policy: Any) -> Any:
    """Freeze by hand the layers that num_layers_unfrozen=1 freezes, without caching their outputs."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("transformer.h.1." in name or "ln_f" in name)
    return policy


def logged(trainer: Any) -> list[dict[str, float]]:
    """Return the logged metrics of each update, without the times."""
    return [
        {name: value for name, value in entry.items() if not name.startswith(("time/", "eps"))}
        for entry in trainer.state.log_history
        if "objective/kl" in entry
    ]


@pytest.mark.parametrize("options", [{}, {"num_mini_batches": 2, "per_device_train_batch_size": 4}], ids=str)
def test_num_layers_unfrozen_matches_manual_freezing(
    make_trainer: Make, make_policy: Make, weights_of: Make, options: dict[str, Any]
) -> None:
    # Adam turns rounding errors of zero gradients (biases of keys) into full steps; SGD does not.
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 12} | options
    plain = make_trainer(freeze_all_but_the_last_layer_(make_policy(initializer_range=0.2)), **options)
    cached = make_trainer(make_policy(initializer_range=0.2), num_layers_unfrozen=1, **options)
    initial = weights_of(cached.model)
    for trainer in (plain, cached):
        trainer.train()
    expected, weights = weights_of(plain.model), weights_of(cached.model)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-5, rtol=0, msg=name)
        trained = not torch.equal(weights[name], initial[name])
        assert trained == (".h.1." in name or "ln_f" in name or "value" in name), name
    for metrics, expected_metrics in zip(logged(cached), logged(plain), strict=True):
        assert metrics == pytest.approx(expected_metrics, rel=1e-3, abs=1e-4)


def test_frozen_layers_run_once_per_rollout_and_never_in_optimizer_steps(
    make_trainer: Make, make_policy: Make
) -> None:
    """They run once at every position of every episode per update, not counting generation."""
    model = make_policy()
    trainer = make_trainer(model, num_layers_unfrozen=1, num_ppo_epochs=3, max_steps=3, rows=8)
    tokens = {0: 0, 1: 0}
    for layer in tokens:
        model.transformer.h[layer].register_forward_pre_hook(
            lambda _, inputs, layer=layer: tokens.__setitem__(layer, tokens[layer] + inputs[0].shape[:2].numel())
        )
    generate_answers, lengths = trainer.generate, []

    def generate(*args: Any) -> Any:
        answers = generate_answers(*args)
        tokens.update({0: 0, 1: 0})
        lengths.extend(len(query) + len(ids) for query, ids in zip(args[0], answers.ids, strict=True))
        return answers

    trainer.generate = generate
    trainer.train()
    assert sum(lengths) <= tokens[0] <= 8 * max(lengths), "once"
    assert tokens[1] == tokens[0] * (1 + 3), "the trained layer of the policy: in the rollout and in each epoch"


def test_the_reference_copies_the_trained_layers_only(make_trainer: Make, make_policy: Make) -> None:
    trainer = make_trainer(make_policy(initializer_range=0.2), num_layers_unfrozen=1, learning_rate=0.0)
    copied = sum(weight.numel() for weight in trainer.collector.reference.module.trunk.h.parameters())
    assert copied == sum(weight.numel() for weight in trainer.model.policy.transformer.h[1].parameters())
    trainer.train()
    assert all(entry["objective/kl"] == pytest.approx(0, abs=1e-6) for entry in logged(trainer))


def test_kept_casts_change_no_weight(make_trainer: Make, make_policy: Make, weights_of: Make, recorder: type) -> None:
    """In bfloat16, keeping the casts or casting the weights again for each piece gives the same run bit for bit."""
    weights = []
    for cache_casts in (True, False):
        trainer = make_trainer(
            make_policy(initializer_range=0.2), trainer_class=recorder, bf16=True, max_steps=8, per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )  # fmt: skip
        assert trainer.piece_runner.cache_casts
        trainer.piece_runner.cache_casts = cache_casts
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.autocast_decrement_nesting() == -1
    assert torch.autocast_increment_nesting() == 0, "no cast is kept after the run"


def test_splitting_a_minibatch_changes_no_weight(make_trainer: Make, make_policy: Make, weights_of: Make) -> None:
    """One piece with all eight episodes, or one piece per episode: equal weights up to rounding."""
    weights, pieces = [], []
    for tokens in (10_000, 1):
        trainer = make_trainer(make_policy(initializer_range=0.2), max_steps=8, optim="sgd", learning_rate=0.05)
        trainer.collector.max_tokens = trainer.piece_runner.max_tokens = tokens
        compute_loss, rows = trainer.compute_loss, []

        def counted(
            model: Any, inputs: Any, compute_loss: Any = compute_loss, rows: Any = rows, **options: Any
        ) -> Any:
            rows.append(len(inputs["input_ids"]))
            return compute_loss(model, inputs, **options)

        trainer.compute_loss = counted
        trainer.train()
        weights.append(weights_of(trainer.model))
        pieces.append(rows)
    assert pieces == [[8] * 8, [1] * 64]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("separate", ["value_model", "ref_model"])
def test_separate_value_and_reference_models_run_all_layers(
    make_trainer: Make, make_policy: Make, make_reward_model: Make, separate: str
) -> None:
    """A separate value or reference model cannot use the policy's cached states."""
    model = {"value_model": make_reward_model(4), "ref_model": make_policy(5, initializer_range=0.2)}[separate]
    plain = make_trainer(
        freeze_all_but_the_last_layer_(make_policy(initializer_range=0.2)), max_steps=4, **{separate: model}
    )
    model = {"value_model": make_reward_model(4), "ref_model": make_policy(5, initializer_range=0.2)}[separate]
    cached = make_trainer(make_policy(initializer_range=0.2), num_layers_unfrozen=1, max_steps=4, **{separate: model})
    for trainer in (plain, cached):
        trainer.train()
    for metrics, expected_metrics in zip(logged(cached), logged(plain), strict=True):
        assert metrics == pytest.approx(expected_metrics, rel=1e-3, abs=1e-4)


def test_an_adapter_is_added_to_the_trained_layers_only(make_trainer: Make, make_policy: Make) -> None:
    trainer = make_trainer(
        make_policy(initializer_range=0.2), num_layers_unfrozen=1, peft_config=LoraConfig(**ADAPTER), max_steps=8
    )
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and all(".h.1." in name or "value" in name for name in names)
    trainer.train()
    first, last = logged(trainer)[0], logged(trainer)[-1]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-6), "the base is the reference"
    assert last["objective/kl"] != 0


def test_an_adapter_on_frozen_layers_is_refused(make_trainer: Make, make_policy: Make) -> None:
    with pytest.raises(UserError, match="has weights below the last 1 layers"):
        make_trainer(
            make_policy(), num_layers_unfrozen=1, peft_config=LoraConfig(layers_to_transform=[0, 1], **ADAPTER)
        )
