"""What must hold of the numbers: log-probabilities, masks, precision, metrics and rows that stand alone."""

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
LEFT_OVER = {
    "do_sample": True,
    "repetition_penalty": 1.5,
    "top_p": 0.5,
    "top_k": 5,
    "temperature": 0.3,
    "no_repeat_ngram_size": 2,
}


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def with_opinions(trainer: Any) -> Any:
    """Gives a fresh value head weights, so that values are not all zero."""
    if not hasattr(trainer.model.value_model, "config"):
        generator = torch.Generator().manual_seed(9)
        trainer.model.value_model.score.weight.data.normal_(0, 0.2, generator=generator)
        trainer.model.value_model.score.bias.data.fill_(0.1)
    return trainer


def episodes_in(step: Any) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Of each row of a recorded micro-batch: its number, its ids without padding, its count of generated tokens."""
    for row, (ids, mask) in enumerate(zip(step.inputs["input_ids"], step.inputs["attention_mask"], strict=True)):
        yield row, tuple(ids[mask.bool()].tolist()), int(step.inputs["response_mask"][row].sum())


# 2: a policy that does not move.


@pytest.mark.parametrize("explicit", [False, True], ids=["copied", "given"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_zero_learning_rate_keeps_kl_zero_and_ratio_one(
    make_trainer: Make, make_policy: Make, recorder: type, precision: str, explicit: bool
) -> None:
    model = make_policy(initializer_range=0.2)
    model = model.to(torch.bfloat16) if precision == "bfloat16" else model
    for name, value in LEFT_OVER.items():
        setattr(model.generation_config, name, value)
    trainer = make_trainer(
        model, kind=recorder, learning_rate=0.0, bf16=precision == "autocast", num_ppo_epochs=2, num_mini_batches=2,
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
    """Prompts and answers that fill a context, whole tiles or not, and the padding id among the last tokens."""
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
    reference: ModuleType,
    temperature: float,
) -> None:
    """Read again in float64 from all logits of each episode without padding; so are entropies and values."""
    model = make_policy(initializer_range=0.2)
    for name, value in LEFT_OVER.items():
        setattr(model.generation_config, name, value)
    other = make_policy(5, initializer_range=0.2)
    trainer = make_trainer(
        model, kind=recorder, temperature=temperature, num_ppo_epochs=1, num_mini_batches=2, ref_model=other, rows=8,
        value_model=make_reward_model(4, initializer_range=0.2),
    )  # fmt: skip
    far = copy.deepcopy(other).double()
    trainer.train()
    at_rollout = trainer.played[0][0]
    for step in trainer.steps:
        for row, ids, tokens in episodes_in(step):
            prompt, answer = ids[: len(ids) - tokens], ids[len(ids) - tokens :]
            old = reference.read(at_rollout, prompt, answer, temperature)
            new = reference.read(step.model, prompt, answer, temperature)
            distant = reference.read(far, prompt, answer, temperature)
            for found, expected in (
                (step.inputs["log_probs"], old.log_probs),
                (step.inputs["values"], old.values),
                (step.inputs["reference_log_probs"], distant.log_probs),
                (step.outputs.log_probs, new.log_probs),
                (step.outputs.values, new.values),
                (step.outputs.entropies, new.entropies),
            ):
                np.testing.assert_allclose(found[row, :tokens], expected, rtol=0, atol=1e-5)
                assert not found[row, tokens:].any(), "padding holds zeros"


# 3: masks.


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "<|end|>", "a"])
def test_pad_id_changes_no_number(
    make_trainer: Make, make_policy: Make, make_tokenizer: Make, weights_of: Make, pad_token: str
) -> None:
    """EOS, or a token that prompts and answers contain, as padding: the same run to the last bit."""
    found = []
    for token in ("<|pad|>", pad_token):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = token
        model = make_policy(pad_token_id=tokenizer.pad_token_id)
        model.generation_config.eos_token_id = [97, 256, *range(200, 250)]
        rows = [{"prompt": f"a{'a' * (row % 3)} <|endoftext|>b<|end|>{row}"} for row in range(16)]
        trainer = make_trainer(model, rows=rows, processing_class=tokenizer, num_ppo_epochs=2, missing_eos_penalty=1.0)
        trainer.train()
        found.append((weights_of(trainer.model), trainer.state.log_history))
    (weights, history), (others, other_history) = found
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for entry, other in zip(history, other_history, strict=True):
        changing = {name for name in entry if name.startswith(("time/", "train_")) or name == "eps"}
        assert {name: entry[name] for name in entry if name not in changing} == {
            name: other[name] for name in other if name not in changing
        }


def test_final_eos_is_trained_even_if_it_is_the_pad_token(
    make_trainer: Make, make_tokenizer: Make, recorder: type
) -> None:
    class Ending(recorder):  # type: ignore[misc, valid-type]
        """Every answer is some letters and EOS."""

        def generate(self, queries: Any, seeds: Any) -> Completions:
            return Completions([[65 + row] * (row % 4) + [256] for row in range(len(queries))], [True] * len(queries))

    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make_trainer(kind=Ending, rows=8, processing_class=tokenizer, learning_rate=0.0)
    trainer.train()
    inputs = trainer.steps[0].inputs
    lengths = inputs["response_mask"].sum(1)
    assert sorted(lengths.tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    _, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    outputs.log_probs.retain_grad()
    loss, _ = trainer.compute_loss(lambda *args, **kwargs: outputs, inputs, return_outputs=True)
    loss.backward()
    last = outputs.log_probs.grad[torch.arange(8), lengths - 1]
    assert bool((last != 0).all()), "the gradient of each final EOS"
    assert bool((outputs.log_probs.grad[~inputs["response_mask"]] == 0).all()), "and none of the padding"


# 8: precision, and numbers that are no numbers.


def test_log_probs_values_and_losses_are_float32_under_bf16(make_trainer: Make, recorder: type) -> None:
    trainer = with_opinions(make_trainer(kind=recorder, bf16=True, num_ppo_epochs=1))
    losses = []
    inner = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        losses.append(inner(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = watched
    trainer.train()
    for step in trainer.steps:
        numbers = [*step.outputs, *(step.inputs[name] for name in ("log_probs", "reference_log_probs", "values"))]
        assert {tensor.dtype for tensor in numbers} == {torch.float32}
        rounded = step.outputs.log_probs.bfloat16().float()
        assert (rounded != step.outputs.log_probs).any(), "not float32 in name only"
        spread = (step.inputs["rewards"], step.inputs["advantages"], step.inputs["returns"])
        assert {tensor.dtype for tensor in spread} == {torch.float32}
    assert {loss.dtype for loss in losses} == {torch.float32}


@pytest.mark.parametrize("separate", [False, True])
def test_value_head_computes_in_float32_under_autocast(
    separate: bool, make_trainer: Make, make_reward_model: Make
) -> None:
    """The head reads bfloat16 states in float32: its sums are not numbers that bfloat16 could hold."""
    trainer = make_trainer(bf16=True, value_model=make_reward_model(4) if separate else None)
    torch.nn.init.normal_(trainer.model.value_model.score.weight)
    rows = torch.arange(24).reshape(4, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        values = trainer.model(rows, torch.ones_like(rows), torch.ones(4, 3, dtype=torch.bool)).values
    assert values.dtype == torch.float32 and (values.bfloat16().float() != values).float().mean() > 0.9


@pytest.mark.parametrize("lengths", [[0, 1], [1, 1], [0, 0], [3, 0]], ids=str)
def test_empty_and_one_token_answers_train_without_nan(make_trainer: Make, recorder: type, lengths: list[int]) -> None:
    class Terse(recorder):  # type: ignore[misc, valid-type]
        def generate(self, queries: Any, seeds: Any) -> Completions:
            ids = [[70 + row] * lengths[row % 2] for row in range(len(queries))]
            return Completions(ids, [len(row) == 1 for row in ids])

    trainer = with_opinions(
        make_trainer(kind=Terse, whiten_rewards=True, missing_eos_penalty=1.0, num_mini_batches=4, rows=8)
    )
    trainer.train()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trainer.model.parameters())
    for entry in trainer.state.log_history:
        assert all(math.isfinite(value) for value in entry.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "good"])
def test_the_error_of_a_non_finite_reward_names_it(make_trainer: Make, bad: Any) -> None:
    def moody(completion_ids: Any, **columns: Any) -> list[Any]:
        return [0.5] * (len(completion_ids) - 1) + [bad]

    with pytest.raises(UserError, match=r"moody returned .* finite number"):
        make_trainer(None, moody).train()


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
@pytest.mark.parametrize("micro_batch", [0, 1], ids=["first", "last"])
def test_a_step_with_a_non_finite_loss_changes_no_weight(
    make_trainer: Make, recorder: type, caplog: pytest.LogCaptureFixture, spoilt: float, micro_batch: int
) -> None:
    """The second of four steps, in the first or the last of its two micro-batches; nor does weight decay act."""

    class Spoilt(recorder):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * spoilt if len(self.steps) == 3 + micro_batch else loss

    trainer = make_trainer(
        kind=Spoilt, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_ppo_epochs=4, rows=8,
        weight_decay=0.1,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="rlhf_recipes"):
        trainer.train()
    before = [step.model.state_dict() for step in trainer.steps[::2]] + [trainer.model.double().state_dict()]
    changed = [any(not torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(before)]
    assert changed == [True, False, True, True]
    assert logged(trainer, "val/skipped_steps") == [1.0]
    assert "optimizer step 2" in caplog.text and "not finite" in caplog.text


# 10: rows that stand alone.


@pytest.mark.parametrize("separate", [False, True], ids=["head", "model"])
def test_a_row_alone_matches_its_row_in_a_batch(
    make_trainer: Make, make_reward_model: Make, recorder: type, separate: bool
) -> None:
    value_model = make_reward_model(2, initializer_range=0.2) if separate else None
    trainer = with_opinions(make_trainer(kind=recorder, rows=8, value_model=value_model))
    trainer.train()
    inputs, model = trainer.steps[0].inputs, trainer.model.eval()
    mask = inputs["response_mask"]
    with torch.no_grad():
        together = model(inputs["input_ids"], inputs["attention_mask"], mask, temperature=0.7)
        for row in range(8):
            ids, tokens = inputs["input_ids"][row][inputs["attention_mask"][row].bool()], int(mask[row].sum())
            alone = model(
                ids[None], torch.ones_like(ids)[None], torch.ones(1, tokens, dtype=torch.bool), temperature=0.7
            )
            for whole, single in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[row, :tokens], single[0], rtol=0, atol=1e-5)
    assert together.values.abs().max() > 0.01


@pytest.mark.parametrize("rows", [1, 3])
def test_rollouts_do_not_depend_on_the_forward_batch_size(
    make_trainer: Make, make_reward_model: Make, recorder: type, rows: int
) -> None:
    """Generation, scoring by a reward model, log-probabilities of policy and reference, and values."""
    found = []
    for at_once in (8, rows):
        reward_model = make_reward_model(3, initializer_range=0.2)
        trainer = with_opinions(
            make_trainer(
                None, reward_model, kind=recorder, rows=8, local_rollout_forward_batch_size=at_once, max_steps=1
            )
        )
        trainer.train()
        found.append((trainer.played[0][2], trainer.steps[0].inputs))
    (answers, inputs), (same_answers, same_inputs) = found
    assert answers == same_answers
    for name in inputs:
        torch.testing.assert_close(inputs[name].float(), same_inputs[name].float(), rtol=0, atol=2e-5)
