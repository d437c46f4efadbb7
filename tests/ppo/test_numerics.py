"""Tests of numerics: log-probabilities, masks, precision, non-finite numbers and batch independence."""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.generation.sampling import Completions

Make = Callable[..., Any]
GENERATION_CONFIG = {  # sampling settings in the model's folder that must change nothing
    "do_sample": True,
    "repetition_penalty": 1.5,
    "top_p": 0.5,
    "top_k": 5,
    "temperature": 0.3,
    "no_repeat_ngram_size": 2,
}


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def with_random_head_(trainer: Any) -> Any:
    """Fill a new value head with random weights, so that values are not all zero; return the trainer."""
    if not hasattr(trainer.model.value_model, "config"):
        generator = torch.Generator().manual_seed(9)
        trainer.model.value_model.score.weight.data.normal_(0, 0.2, generator=generator)
        trainer.model.value_model.score.bias.data.fill_(0.1)
    return trainer


def episodes_in(step: Any) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Yield the number, the ids without padding and the count of generated tokens of each row of a micro-batch."""
    for row, (ids, mask) in enumerate(zip(step.inputs["input_ids"], step.inputs["attention_mask"], strict=True)):
        yield row, tuple(ids[mask.bool()].tolist()), int(step.inputs["response_mask"][row].sum())


# Log-probabilities, entropies and values.


@pytest.mark.parametrize("explicit", [False, True], ids=["copied", "given"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_zero_learning_rate_keeps_kl_zero_and_ratio_one(
    make_trainer: Make, make_policy: Make, recorder: type, precision: str, explicit: bool
) -> None:
    model = make_policy(initializer_range=0.2)
    model = model.to(torch.bfloat16) if precision == "bfloat16" else model
    for name, value in GENERATION_CONFIG.items():
        setattr(model.generation_config, name, value)
    trainer = make_trainer(
        model, trainer_class=recorder, learning_rate=0.0, bf16=precision == "autocast", num_ppo_epochs=2, num_mini_batches=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, local_rollout_forward_batch_size=3,
        ref_model=copy.deepcopy(model) if explicit else None,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.steps) == 8
    for step in trainer.steps:
        difference = step.outputs.log_probs - step.inputs["log_probs"]
        assert difference.exp().sub(1).abs().max() <= 1e-6
        assert step.inputs["kl"].abs().max() <= 1e-6
    assert logged(trainer, "objective/kl") == pytest.approx([0.0, 0.0], abs=1e-6)
    assert logged(trainer, "val/ratio") == pytest.approx([1.0, 1.0], abs=1e-6)
    assert logged(trainer, "val/ratio_var") == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("context", [27, 32])
def test_bf16_padding_stays_within_the_context(make_trainer: Make, make_policy: Make, context: int) -> None:
    """Prompts and answers fill the context, which is or is not a multiple of 16; the pad id can be generated."""
    rows = [{"prompt": "x" * length} for length in (context - 6, 3, 9, context - 6)] * 2
    model = make_policy(n_positions=context, pad_token_id=0)
    trainer = make_trainer(model, rows=rows, bf16=True, learning_rate=0.0, num_mini_batches=2, response_length=6)
    trainer.train()
    assert trainer.collector.width_multiple == (16 if context == 32 else 1)
    assert logged(trainer, "objective/kl") == pytest.approx([0.0], abs=1e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_log_probs_entropies_and_values_match_float64(
    make_trainer: Make,
    make_policy: Make,
    make_reward_model: Make,
    recorder: type,
    float64_ppo: ModuleType,
    temperature: float,
) -> None:
    """Recompute all three in float64 from the logits of each episode without padding."""
    model = make_policy(initializer_range=0.2)
    for name, value in GENERATION_CONFIG.items():
        setattr(model.generation_config, name, value)
    ref_model = make_policy(5, initializer_range=0.2)
    trainer = make_trainer(
        model, trainer_class=recorder, temperature=temperature, num_ppo_epochs=1, num_mini_batches=2, ref_model=ref_model, rows=8,
        value_model=make_reward_model(4, initializer_range=0.2),
    )  # fmt: skip
    ref_model = copy.deepcopy(ref_model).double()
    trainer.train()
    model_at_rollout = trainer.generated[0][0]
    for step in trainer.steps:
        for row, ids, tokens in episodes_in(step):
            prompt, answer = ids[: len(ids) - tokens], ids[len(ids) - tokens :]
            old = float64_ppo.forward(model_at_rollout, prompt, answer, temperature)
            new = float64_ppo.forward(step.model, prompt, answer, temperature)
            ref = float64_ppo.forward(ref_model, prompt, answer, temperature)
            for found, expected in (
                (step.inputs["log_probs"], old.log_probs),
                (step.inputs["values"], old.values),
                (step.inputs["reference_log_probs"], ref.log_probs),
                (step.outputs.log_probs, new.log_probs),
                (step.outputs.values, new.values),
                (step.outputs.entropies, new.entropies),
            ):
                np.testing.assert_allclose(found[row, :tokens], expected, rtol=0, atol=1e-5)
                assert not found[row, tokens:].any(), "padding holds zeros"


# Masks.


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "<|end|>", "a"])
def test_pad_id_changes_no_number(
    make_trainer: Make, make_policy: Make, make_tokenizer: Make, weights_of: Make, pad_token: str
) -> None:
    """Padding with EOS, or with a token that prompts and answers contain, gives the same run bit for bit."""
    runs = []
    for token in ("<|pad|>", pad_token):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = token
        model = make_policy(pad_token_id=tokenizer.pad_token_id)
        model.generation_config.eos_token_id = [97, 256, *range(200, 250)]
        rows = [{"prompt": f"a{'a' * (row % 3)} <|endoftext|>b<|end|>{row}"} for row in range(16)]
        trainer = make_trainer(model, rows=rows, processing_class=tokenizer, num_ppo_epochs=2, missing_eos_penalty=1.0)
        trainer.train()
        runs.append((weights_of(trainer.model), trainer.state.log_history))
    (weights, history), (other_weights, other_history) = runs
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    for entry, other in zip(history, other_history, strict=True):
        times = {name for name in entry if name.startswith(("time/", "train_")) or name == "eps"}
        assert {name: entry[name] for name in entry if name not in times} == {
            name: other[name] for name in other if name not in times
        }


def test_final_eos_is_trained_even_if_it_is_the_pad_token(
    make_trainer: Make, make_tokenizer: Make, recorder: type
) -> None:
    class LettersAndEos(recorder):  # type: ignore[misc, valid-type]
        """A trainer whose answers are up to three letters and EOS."""

        def generate(self, queries: Any, seeds: Any) -> Completions:
            return Completions([[65 + row] * (row % 4) + [256] for row in range(len(queries))], [True] * len(queries))

    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make_trainer(trainer_class=LettersAndEos, rows=8, processing_class=tokenizer, learning_rate=0.0)
    trainer.train()
    inputs = trainer.steps[0].inputs
    lengths = inputs["response_mask"].sum(1)
    assert sorted(lengths.tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    _, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    outputs.log_probs.retain_grad()
    loss, _ = trainer.compute_loss(lambda *args, **kwargs: outputs, inputs, return_outputs=True)
    loss.backward()
    last = outputs.log_probs.grad[torch.arange(8), lengths - 1]
    assert bool((last != 0).all()), "each final EOS has a gradient"
    assert bool((outputs.log_probs.grad[~inputs["response_mask"]] == 0).all()), "padding has none"


# Precision and non-finite numbers.


def test_log_probs_values_and_losses_are_float32_under_bf16(make_trainer: Make, recorder: type) -> None:
    trainer = with_random_head_(make_trainer(trainer_class=recorder, bf16=True, num_ppo_epochs=1))
    losses = []
    compute_loss = trainer.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        losses.append(compute_loss(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = recorded
    trainer.train()
    for step in trainer.steps:
        numbers = [*step.outputs, *(step.inputs[name] for name in ("log_probs", "reference_log_probs", "values"))]
        assert {tensor.dtype for tensor in numbers} == {torch.float32}
        rounded = step.outputs.log_probs.bfloat16().float()
        assert (rounded != step.outputs.log_probs).any(), "the numbers use more than the bits of bfloat16"
        targets = (step.inputs["rewards"], step.inputs["advantages"], step.inputs["returns"])
        assert {tensor.dtype for tensor in targets} == {torch.float32}
    assert {loss.dtype for loss in losses} == {torch.float32}


@pytest.mark.parametrize("separate", [False, True])
def test_value_head_computes_in_float32_under_autocast(
    separate: bool, make_trainer: Make, make_reward_model: Make
) -> None:
    """The head computes in float32 on bfloat16 states: most values are not representable in bfloat16."""
    trainer = make_trainer(bf16=True, value_model=make_reward_model(4) if separate else None)
    torch.nn.init.normal_(trainer.model.value_model.score.weight)
    rows = torch.arange(24).reshape(4, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        values = trainer.model(rows, torch.ones_like(rows), torch.ones(4, 3, dtype=torch.bool)).values
    assert values.dtype == torch.float32 and (values.bfloat16().float() != values).float().mean() > 0.9


@pytest.mark.parametrize("lengths", [[0, 1], [1, 1], [0, 0], [3, 0]], ids=str)
def test_empty_and_one_token_answers_train_without_nan(make_trainer: Make, recorder: type, lengths: list[int]) -> None:
    class ShortAnswers(recorder):  # type: ignore[misc, valid-type]
        def generate(self, queries: Any, seeds: Any) -> Completions:
            ids = [[70 + row] * lengths[row % 2] for row in range(len(queries))]
            return Completions(ids, [len(row) == 1 for row in ids])

    trainer = with_random_head_(
        make_trainer(
            trainer_class=ShortAnswers, whiten_rewards=True, missing_eos_penalty=1.0, num_mini_batches=4, rows=8
        )
    )
    trainer.train()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trainer.model.parameters())
    for entry in trainer.state.log_history:
        assert all(math.isfinite(value) for value in entry.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "good"])
def test_the_error_of_a_non_finite_reward_names_it(make_trainer: Make, bad: Any) -> None:
    def broken_reward(completion_ids: Any, **columns: Any) -> list[Any]:
        return [0.5] * (len(completion_ids) - 1) + [bad]

    with pytest.raises(UserError, match=r"broken_reward returned .* finite number"):
        make_trainer(None, broken_reward).train()


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
@pytest.mark.parametrize("micro_batch", [0, 1], ids=["first", "last"])
def test_a_step_with_a_non_finite_loss_changes_no_weight(
    make_trainer: Make, recorder: type, caplog: pytest.LogCaptureFixture, factor: float, micro_batch: int
) -> None:
    """The loss of one micro-batch of the second of four steps is not finite; weight decay does not act either."""

    class NonFiniteLoss(recorder):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * factor if len(self.steps) == 3 + micro_batch else loss

    trainer = make_trainer(
        trainer_class=NonFiniteLoss, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_ppo_epochs=4, rows=8,
        weight_decay=0.1,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes"):
        trainer.train()
    before = [step.model.state_dict() for step in trainer.steps[::2]] + [trainer.model.double().state_dict()]
    changed = [any(not torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(before)]
    assert changed == [True, False, True, True]
    assert logged(trainer, "val/skipped_steps") == [1.0]
    assert "optimizer step 2" in caplog.text and "not finite" in caplog.text


# Independence of the batch.


@pytest.mark.parametrize("separate", [False, True], ids=["head", "model"])
def test_a_row_alone_matches_its_row_in_a_batch(
    make_trainer: Make, make_reward_model: Make, recorder: type, separate: bool
) -> None:
    value_model = make_reward_model(2, initializer_range=0.2) if separate else None
    trainer = with_random_head_(make_trainer(trainer_class=recorder, rows=8, value_model=value_model))
    trainer.train()
    inputs, model = trainer.steps[0].inputs, trainer.model.eval()
    mask = inputs["response_mask"]
    with torch.no_grad():
        batch = model(inputs["input_ids"], inputs["attention_mask"], mask, temperature=0.7)
        for row in range(8):
            ids, tokens = inputs["input_ids"][row][inputs["attention_mask"][row].bool()], int(mask[row].sum())
            single = model(
                ids[None], torch.ones_like(ids)[None], torch.ones(1, tokens, dtype=torch.bool), temperature=0.7
            )
            for in_batch, alone in zip(batch, single, strict=True):
                torch.testing.assert_close(in_batch[row, :tokens], alone[0], rtol=0, atol=1e-5)
    assert batch.values.abs().max() > 0.01


@pytest.mark.parametrize("rows", [1, 3])
def test_rollouts_do_not_depend_on_the_forward_batch_size(
    make_trainer: Make, make_reward_model: Make, recorder: type, rows: int
) -> None:
    """Answers, scores, log-probabilities of policy and reference, and values are equal."""
    runs = []
    for batch_size in (8, rows):
        reward_model = make_reward_model(3, initializer_range=0.2)
        trainer = with_random_head_(
            make_trainer(
                None,
                reward_model,
                trainer_class=recorder,
                rows=8,
                local_rollout_forward_batch_size=batch_size,
                max_steps=1,
            )
        )
        trainer.train()
        runs.append((trainer.generated[0][2], trainer.steps[0].inputs))
    (answers, inputs), (other_answers, other_inputs) = runs
    assert answers == other_answers
    for name in inputs:
        torch.testing.assert_close(inputs[name].float(), other_inputs[name].float(), rtol=0, atol=2e-5)
