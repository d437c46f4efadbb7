"""Tests of answer endings, reward sources, value models and unusable prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.generation.sampling import Completions

Make = Callable[..., Any]
STOP_IDS = list(range(200, 256))


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def letters_of_answer(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Return a reward that depends on a column of the dataset."""
    return [float(len(text) + ord(letter)) for text, letter in zip(completions, answer, strict=True)]


def count_tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


# Endings of answers.


def with_likely_tokens_(model: Any, *tokens: int) -> Any:
    """Change the model so that these tokens are much more likely; return it."""
    with torch.no_grad():
        model.lm_head.weight[list(tokens)] *= 40
    return model


@pytest.mark.parametrize(
    ("options", "ids"),
    [({}, [*STOP_IDS, 256]), ({"stop_token": "eos"}, [256]), ({"stop_token_id": 33}, [33])],
    ids=["generation config", "eos", "custom"],
)
def test_answers_stop_at_the_configured_stop_ids(
    make_trainer: Make, make_policy: Make, recorder: type, options: dict[str, Any], ids: list[int]
) -> None:
    """By default also where the chat template ends a turn: at 256."""
    model = with_likely_tokens_(make_policy(), 33, 256)
    trainer = make_trainer(
        model, trainer_class=recorder, rows=32, per_device_train_batch_size=32, response_length=20, **options
    )
    trainer.train()
    _, _, answers = trainer.generated[0]
    for answer, stopped in zip(answers.ids, answers.stopped, strict=True):
        assert stopped == (answer[-1] in ids)
        assert not set(answer[:-1]) & set(ids)
        assert stopped or len(answer) == 20
    assert any(answers.stopped)
    assert logged(trainer, "val/num_eos_tokens") == [sum(answers.stopped)]


@pytest.mark.parametrize("options", [{}, {"stop_token_id": 33}], ids=["generation config", "custom"])
def test_missing_eos_penalty_applies_to_answers_without_a_stop_id(
    make_trainer: Make, make_policy: Make, recorder: type, options: dict[str, Any]
) -> None:
    """An answer that no stop id ended is penalized; the score with the penalty is added at its last token."""
    model = with_likely_tokens_(make_policy(), 33)
    trainer = make_trainer(model, trainer_class=recorder, missing_eos_penalty=3.0, learning_rate=0.0, **options)
    trainer.train()
    (scores,), (_, _, answers) = trainer.scored[0].values(), trainer.generated[0]
    totals = [score - (0 if stopped else 3) for score, stopped in zip(scores, answers.stopped, strict=True)]
    expected = dict(zip(map(tuple, answers.ids), totals, strict=True))
    assert {True, False} == set(answers.stopped)
    inputs = trainer.steps[0].inputs
    for row, mask in enumerate(inputs["response_mask"]):
        length = int(mask.sum())
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        answer = tuple(ids[len(ids) - length :].tolist())
        rewards = inputs["rewards"][row]
        assert rewards[length - 1].item() == pytest.approx(expected[answer], abs=1e-6)
        assert rewards[: length - 1].abs().max().item() < 1e-6 if length > 1 else True, (
            "without KL only the last token has one"
        )
        assert inputs["scores"][row].item() == pytest.approx(expected[answer], abs=1e-6)
    assert logged(trainer, "objective/scores")[0] == pytest.approx(sum(totals) / 8, abs=1e-6)
    assert logged(trainer, "rewards/low_share")[0] == pytest.approx(sum(scores) / 8, abs=1e-6)


def test_saved_generation_config_equals_the_loaded_one(
    make_trainer: Make, make_policy: Make, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_policy()
    for name, value in {"do_sample": True, "top_p": 0.5, "temperature": 0.3, "repetition_penalty": 1.5}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    trainer = make_trainer(str(tmp_path / "policy"), stop_token_id=33, processing_class=None)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    before, after = (
        json.loads((tmp_path / folder / "generation_config.json").read_text()) for folder in ("policy", "trained")
    )
    assert after == before and after["eos_token_id"] == STOP_IDS


# Rewards.


@pytest.mark.parametrize("source", ["model", "path"])
@pytest.mark.parametrize("labels", [1, 2])
def test_reward_model_scores_match_a_direct_forward(
    make_trainer: Make,
    make_reward_model: Make,
    recorder: type,
    tokenizer: Any,
    tmp_path: Path,
    source: str,
    labels: int,
) -> None:
    """Given as a model and as a folder; with two labels the score is the log-odds of the second."""
    reward_model = make_reward_model(3, num_labels=labels, initializer_range=0.2)
    folder = tmp_path / "reward_model"
    reward_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = make_trainer(
        None, reward_model if source == "model" else str(folder), trainer_class=recorder, max_steps=1
    )
    trainer.train()
    (scores,), (_, queries, answers) = trainer.scored[0].values(), trainer.generated[0]
    assert list(trainer.scored[0]) == ["reward_model"]
    for query, answer, score in zip(queries, answers.ids, scores, strict=True):
        with torch.no_grad():
            logits = reward_model(torch.tensor([[*query, *answer]])).logits[0]
        assert score == pytest.approx((logits[-1] - (logits[0] if labels == 2 else 0)).item(), abs=1e-5)


def test_reward_function_receives_prompts_completions_ids_and_columns(make_trainer: Make, recorder: type) -> None:
    calls: list[dict[str, Any]] = []

    def record(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids, "columns": columns})
        return [0.0] * len(prompts)

    rows = [{"prompt": f"Question {row}", "answer": chr(97 + row), "level": row} for row in range(8)]
    trainer = make_trainer(None, record, rows=rows, trainer_class=recorder, max_steps=1)
    trainer.train()
    (call,) = calls
    numbers = [int(prompt.removeprefix("Question ")) for prompt in call["prompts"]]
    assert sorted(numbers) == list(range(8))
    assert call["columns"] == {"answer": [chr(97 + number) for number in numbers], "level": numbers}
    assert call["ids"] == trainer.generated[0][2].ids
    texts = [bytes(token for token in ids if token < 256).decode(errors="replace") for ids in call["ids"]]
    assert call["completions"] == texts


def test_reward_function_receives_messages_for_conversations(
    make_trainer: Make, recorder: type, tokenizer: Any
) -> None:
    messages: list[Any] = []

    def record(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        messages.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    rows = [{"prompt": [{"role": "user", "content": f"Hello {row}"}]} for row in range(8)]
    trainer = make_trainer(None, record, rows=rows, trainer_class=recorder, max_steps=1)
    trainer.train()
    _, queries, answers = trainer.generated[0]
    for (prompt, completion), query, answer in zip(messages, queries, answers.ids, strict=True):
        assert tokenizer.decode(query) == f"<|user|>{prompt[0]['content']}<|end|><|assistant|>"
        assert completion == [{"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}]


def test_scores_are_the_weighted_sum_of_rewards(make_trainer: Make, make_reward_model: Make, recorder: type) -> None:
    """A reward model, a function that reads a column, and a function of weight 0, which is only logged."""
    reward_model = make_reward_model(3, initializer_range=0.2)
    rows = [{"prompt": f"Q{row}", "answer": chr(97 + row)} for row in range(8)]
    trainer = make_trainer(
        None, [reward_model, letters_of_answer, count_tokens], rows=rows, trainer_class=recorder, reward_weights=[2.0, -0.5, 0.0],
        learning_rate=0.0, max_steps=4, num_ppo_epochs=4,
    )  # fmt: skip
    trainer.train()
    scored, (_, queries, answers) = trainer.scored[0], trainer.generated[0]
    assert list(scored) == ["reward_model", "letters_of_answer", "count_tokens"]
    totals = [2 * first - 0.5 * second for first, second, _ in zip(*scored.values(), strict=True)]
    expected = {(*query, *answer): total for query, answer, total in zip(queries, answers.ids, totals, strict=True)}
    inputs = trainer.steps[0].inputs
    for ids, mask, score in zip(inputs["input_ids"], inputs["attention_mask"], inputs["scores"], strict=True):
        assert score.item() == pytest.approx(expected[tuple(ids[mask.bool()].tolist())], rel=1e-6)
    assert logged(trainer, "objective/scores") == pytest.approx([sum(totals) / 8], rel=1e-6)
    for name, values in scored.items():
        assert logged(trainer, f"rewards/{name}") == pytest.approx([sum(values) / 8], rel=1e-6)


def test_rewards_by_import_path_and_reward_model_keyword(
    make_trainer: Make, recorder: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completion_ids, **_):\n    return [-len(i) for i in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(
        None, None, reward_model=["my_rewards:brevity", count_tokens, count_tokens], trainer_class=recorder
    )
    trainer.train()
    lengths = [float(len(ids)) for ids in trainer.generated[0][2].ids]
    assert trainer.scored[0]["brevity"] == [-length for length in lengths]
    assert list(trainer.scored[0]) == ["brevity", "count_tokens", "count_tokens_2"], "equal names get a number"
    assert logged(trainer, "objective/scores")[0] == pytest.approx(sum(lengths) / 8)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (None, {}, "reward_funcs"),
        ([count_tokens], {"reward_weights": [1.0, 2.0]}, "reward_weights"),
        (lambda completions, **_: [1.0], {}, "returned 1 scores for 8"),
        ("no_such_module:reward", {}, "cannot be imported"),
    ],
    ids=["none", "weights", "too few scores", "no such function"],
)
def test_invalid_rewards_are_refused(make_trainer: Make, sources: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_trainer(None, sources, **options).train()
    assert "\n" not in str(raised.value)


def test_a_reward_of_another_type_is_a_type_error(make_trainer: Make) -> None:
    with pytest.raises(TypeError, match="a model, a path, or a function"):
        make_trainer(None, 3.5)


# Value models.


def test_default_value_model_is_a_head_on_the_policy(make_trainer: Make) -> None:
    trainer = make_trainer(value_model=None, vf_coef=1.0)
    head = trainer.model.value_model
    before = head.score.weight.detach().clone()
    trainer.train()
    assert before.abs().max() == 0 and head.score.weight.abs().max() > 0
    assert sum(tensor.numel() for tensor in head.parameters()) == 32 + 1


def test_one_label_sequence_classifier_trains_as_value_model(
    make_trainer: Make, make_reward_model: Make, weights_of: Make
) -> None:
    value_model = make_reward_model(2)
    before = weights_of(value_model)
    trainer = make_trainer(value_model=value_model, vf_coef=1.0)
    trainer.train()
    after = weights_of(value_model)
    assert not torch.equal(before["score.weight"], after["score.weight"])
    assert not torch.equal(before["transformer.h.0.mlp.c_fc.weight"], after["transformer.h.0.mlp.c_fc.weight"])


@pytest.mark.parametrize("case", ["language model", "two labels", "layer"])
def test_a_value_model_of_another_type_is_a_type_error(
    make_trainer: Make, make_reward_model: Make, make_policy: Make, case: str
) -> None:
    value_model, name = {
        "language model": (make_policy(), "GPT2LMHeadModel"),
        "two labels": (make_reward_model(num_labels=2), "GPT2ForSequenceClassification with 2 labels"),
        "layer": (torch.nn.Linear(32, 1), "Linear"),
    }[case]
    with pytest.raises(TypeError, match=f"{name}.*AutoModelForSequenceClassification with num_labels=1, or None"):
        make_trainer(value_model=value_model)


# Unusable prompts.


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (7, "7 prompts, fewer than the 8 episodes"),
        ([], "train_dataset has no rows"),
        (None, "train_dataset has no rows"),
        ([{"text": "Hello"}] * 8, "prompt"),
        ([{"prompt": "Hello"}] * 8 + [{"prompt": "x" * 123}], "row 8 has a prompt of 123 tokens.*context of 128"),
        ([{"prompt": ""}] * 8, "empty"),
    ],
    ids=["small", "empty", "none", "column", "long", "empty prompt"],
)
def test_unusable_prompts_are_refused_at_construction(
    make_trainer: Make, tmp_path: Path, rows: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_trainer(rows=rows)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert not (tmp_path / "out").exists(), "no file was written"


def test_a_prompt_that_just_fits_the_context_is_answered(make_trainer: Make, recorder: type) -> None:
    trainer = make_trainer(rows=[{"prompt": "x" * 122}] * 8, trainer_class=recorder, stop_token_id=0, max_steps=1)
    trainer.train()
    _, queries, answers = trainer.generated[0]
    assert {len(query) for query in queries} == {122} and max(map(len, answers.ids)) == 6


def test_eval_prompts_are_checked_at_construction(make_trainer: Make) -> None:
    with pytest.raises(UserError, match="eval_dataset row 0 has a prompt of 200 tokens"):
        make_trainer(eval_dataset=[{"prompt": "x" * 200}])


def test_missing_tokenizer_and_policy_as_its_own_reference_are_refused(make_trainer: Make, make_policy: Make) -> None:
    with pytest.raises(UserError, match="processing_class"):
        make_trainer(processing_class=None)
    model = make_policy()
    with pytest.raises(UserError, match="ref_model is the policy itself"):
        make_trainer(model, ref_model=model)


def test_training_uses_the_completions_of_an_overridden_generate(make_trainer: Make, recorder: type) -> None:
    """`generate` is overridden with fixed answers."""

    class FixedAnswers(recorder):  # type: ignore[misc, valid-type]
        def generate(self, queries: Any, seeds: Any) -> Completions:
            return Completions([[72, 105, 256]] * len(queries), [True] * len(queries))

    trainer = make_trainer(trainer_class=FixedAnswers, rows=8, max_steps=1)
    trainer.train()
    inputs = trainer.steps[0].inputs
    ends = [ids[mask.bool()][-3:] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert [end.tolist() for end in ends] == [[72, 105, 256]] * 8 and bool(inputs["stopped"].all())
