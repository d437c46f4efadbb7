"""What must hold of functions as rewards: those that wait, those that reward tokens, and those that err."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.generation.sampling import Completions

Make = Callable[..., Any]
PATIENCE = 20  # seconds until a function that nobody meets gives up: what is tested never waits


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]


def halves(completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    """A reward of each token."""
    return [[token / 256 - 0.5 for token in ids] for ids in completion_ids]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# 11: functions that wait.


def test_async_rewards_run_concurrently_and_receive_every_column(make_trainer: Make, recorder: type) -> None:
    """Three that each wait for the other two, one of them a plain function: one after the other, none would return."""
    meeting = threading.Barrier(3)

    async def letters(answer: list[str], **columns: Any) -> list[float]:
        await asyncio.to_thread(meeting.wait, PATIENCE)
        return [float(ord(letter)) for letter in answer]

    async def levels(level: list[int], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        await asyncio.to_thread(meeting.wait, PATIENCE)
        return [value + len(ids) for value, ids in zip(level, completion_ids, strict=True)]

    def plain(prompts: list[str], **columns: Any) -> list[float]:
        meeting.wait(PATIENCE)
        return [float(prompt.removeprefix("Question ")) for prompt in prompts]

    rows = [{"prompt": f"Question {row}", "answer": chr(97 + row), "level": 10 * row} for row in range(8)]
    trainer = make_trainer(None, [letters, plain, levels], rows=rows, kind=recorder, max_steps=1)
    trainer.train()
    (scored,), (_, queries, answers) = trainer.scored, trainer.played[0]
    numbers = [int(bytes(query).decode().removeprefix("Question ")) for query in queries]
    assert list(scored) == ["letters", "plain", "levels"] and sorted(numbers) == list(range(8))
    assert scored["letters"] == [97 + number for number in numbers] and scored["plain"] == numbers
    lengths = [len(ids) for ids in answers.ids]
    assert scored["levels"] == [10 * number + length for number, length in zip(numbers, lengths, strict=True)]


def test_async_rewards_work_inside_a_running_event_loop(make_trainer: Make, recorder: type) -> None:
    """As in a notebook: one by its nature, and a plain one that returns something to wait for."""

    async def together(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        here, everyone = [], asyncio.Event()

        async def one(ids: list[int]) -> float:
            here.append(ids)
            if len(here) == len(completion_ids):
                everyone.set()
            await asyncio.wait_for(everyone.wait(), PATIENCE)
            return float(len(ids))

        return await asyncio.gather(*map(one, completion_ids))

    def promise(**columns: Any) -> Any:
        return together(**columns)

    trainer = make_trainer(None, [together, promise], kind=recorder, max_steps=1)

    async def notebook() -> Any:
        return trainer.train()

    assert asyncio.run(notebook()).global_step == 1
    lengths = [float(len(ids)) for ids in trainer.played[0][2].ids]
    assert trainer.scored == [{"together": lengths, "promise": lengths}]


# 11: rewards of tokens.


def test_token_rewards_are_added_at_their_tokens(make_trainer: Make, recorder: type) -> None:
    """Worked out for each episode of the second update, where policy and reference differ, beside a reward of answers."""
    trainer = make_trainer(
        None, [halves, low_share], kind=recorder, reward_weights=[0.5, 2.0], kl_coef=0.3, learning_rate=3e-3
    )
    trainer.train()
    wanted = {}
    for update, (_, queries, answers) in enumerate(trainer.played):
        for query, ids in zip(queries, answers.ids, strict=True):
            earned = [0.5 * (token / 256 - 0.5) for token in ids]
            earned[-1] += 2 * sum(token < 128 for token in ids) / len(ids)
            wanted[update, (*query, *ids)] = earned
    inputs = trainer.steps[-1].inputs
    distance = 0.0
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        earned = wanted[1, tuple(ids[mask.bool()].tolist())]
        kl = (inputs["log_probs"] - inputs["reference_log_probs"])[row, : len(earned)].tolist()
        expected = [reward - 0.3 * each for reward, each in zip(earned, kl, strict=True)]
        assert inputs["rewards"][row, : len(earned)].tolist() == pytest.approx(expected, abs=1e-6)
        assert not inputs["rewards"][row, len(earned) :].any()
        assert inputs["scores"][row].item() == pytest.approx(sum(earned), abs=1e-6)
        distance += sum(map(abs, kl))
    assert distance > 0.1
    for update, score in enumerate(logged(trainer, "objective/scores")):
        sums = [sum(earned) for (number, _), earned in wanted.items() if number == update]
        assert score == pytest.approx(sum(sums) / 8, abs=1e-6)
    sums = [sum(token / 256 - 0.5 for token in ids) for ids in trainer.played[0][2].ids]
    assert logged(trainer, "rewards/halves")[0] == pytest.approx(sum(sums) / 8, abs=1e-9)


def test_a_reward_of_the_last_token_equals_a_reward_of_the_answer(make_trainer: Make, weights_of: Make) -> None:
    """Bit for bit, whether the tokens' rewards come as lists, as arrays or as tensors."""

    def of_last_token(kind: Any) -> Any:
        def at_the_end(completion_ids: list[list[int]], **columns: Any) -> list[Any]:
            scores = zip(completion_ids, low_share(completion_ids), strict=True)
            return [kind([0.0] * (len(ids) - 1) + [score]) for ids, score in scores]

        return at_the_end

    tensor = partial(torch.tensor, dtype=torch.float64)
    found = []
    for function in (low_share, *map(of_last_token, (list, np.array, tensor))):
        trainer = make_trainer(None, function, kl_coef=0.2, num_mini_batches=2, num_ppo_epochs=1)
        started = weights_of(trainer.model)
        trainer.train()
        found.append(weights_of(trainer.model))
    assert not same(started, found[0])
    assert [same(found[0], other) for other in found[1:]] == [True] * 3


# 11: functions that err.


def no_such_book(prompt: str) -> float:
    raise LookupError(prompt)


HERE = rf"{Path(__file__).name}:{inspect.getsourcelines(no_such_book)[1] + 1}"
ERRORS: dict[str, tuple[Any, str]] = {
    "None": (lambda prompt: None, "returned None"),
    "NaN": (lambda prompt: float("nan"), "returned nan"),
    "text": (lambda prompt: "good", "returned 'good'"),
    "NaN of a token": (lambda prompt: [0.0, float("nan")], "returned nan"),
    "None of a token": (lambda prompt: [0.0, None], "returned None"),
    "list of a token": (lambda prompt: [0.0, [1.0]], r"returned \[1.0\]"),
    "one token too few": (lambda prompt: np.zeros(1), r"returned 1 token rewards .* has 2 tokens \(completion_ids\)"),
    "no tokens": (lambda prompt: [], "returned 0 token rewards"),
    "raises": (no_such_book, rf"raised LookupError: Question 5 \(.*{HERE}\)"),
}


@pytest.fixture(scope="module")
def judged(trainers_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """(function) -> what a trainer makes of its scores for the answer "Hi" to each of eight questions."""
    rows = [{"prompt": f"Question {row}"} for row in range(8)]
    chosen: list[Any] = []

    def of_the_day(**given: Any) -> Any:
        return chosen[-1](**given)

    trainer = trainers_in(tmp_path_factory.mktemp("judged"))(None, of_the_day, rows=rows)

    def reward_model(function: Any) -> Any:
        chosen.append(function)
        return trainer.score(trainer.prompts.rows(range(8)), Completions([[72, 105]] * 8, [False] * 8))["of_the_day"]

    return reward_model


@pytest.mark.parametrize("kind", ERRORS)
def test_reward_errors_name_the_function_and_the_sample(judged: Callable[[Any], Any], kind: str) -> None:
    wrong, message = ERRORS[kind]

    def strict(prompts: list[str], **columns: Any) -> list[Any]:
        return [wrong(prompt) if prompt == "Question 5" else 0.5 for prompt in prompts]

    def one_by_one(prompts: list[str], **columns: Any) -> Any:
        yield from strict(prompts)

    async def patient(**columns: Any) -> list[Any]:
        await asyncio.sleep(0)
        return strict(**columns)

    for function in (strict, one_by_one, patient):
        with pytest.raises(UserError, match=f"reward function of_the_day {message}") as raised:
            judged(function)
        assert "the completion 'Hi' of the prompt 'Question 5'" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [([0.0] * 7, "7 scores for 8"), ([], "0 scores for 8"), (None, "None for 8"), (0.5, "0.5 for 8")],
    ids=["seven", "none", "None", "one number"],
)
def test_a_reward_function_must_return_one_score_per_completion(
    judged: Callable[[Any], Any], answer: Any, message: str
) -> None:
    with pytest.raises(UserError, match=f"reward function of_the_day returned {message} completions; return"):
        judged(lambda **columns: answer)


def test_scores_of_every_number_type_are_accepted(judged: Callable[[Any], Any]) -> None:
    for kind in (int, bool, np.float32, np.bool_, np.array, torch.tensor):
        assert judged(lambda prompts, kind=kind, **columns: [kind(1)] * len(prompts)) == [1.0] * 8
    for whole in (np.ones(8), torch.ones(8, dtype=torch.bfloat16), tuple([1] * 8), np.ones(8, dtype=bool)):
        assert judged(lambda whole=whole, **columns: whole) == [1.0] * 8


def test_a_reward_error_during_training_names_the_function(make_trainer: Make) -> None:
    async def fails_later(prompts: list[str], **columns: Any) -> list[float]:
        return [no_such_book(prompt) if prompt == "Question 5" else 0.0 for prompt in prompts]

    rows = [{"prompt": f"Question {row}"} for row in range(8)]
    with pytest.raises(UserError, match=rf"reward function fails_later {ERRORS['raises'][1]}.*of the prompt 'Quest"):
        make_trainer(None, [low_share, fails_later], rows=rows).train()


def test_a_policy_that_changes_its_logits_after_the_head_is_refused(make_policy: Any, make_trainer: Any) -> None:
    """Probabilities are read from the head; what a model does to logits after it would be left out."""
    model = make_policy(initializer_range=0.3)
    forward = model.forward

    def bent(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = 3 * torch.tanh(outputs.logits / 3)
        return outputs

    model.forward = bent
    with pytest.raises(UserError, match="are not its head on the states of its trunk"):
        make_trainer(model)


def test_value_head_has_the_width_of_the_projected_last_states(make_trainer: Any, tokenizer: Any) -> None:
    """As facebook/opt-350m: 1024 wide inside, 512 where the head reads."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = OPTForCausalLM(
        OPTConfig(vocab_size=len(tokenizer), word_embed_proj_dim=16, do_layer_norm_before=False, **shape, **ends)
    )
    trainer = make_trainer(model, max_steps=1)
    trainer.train()
    assert trainer.model.value_model.score.weight.shape == (1, 16)
    assert trainer.model.value_model.score.weight.abs().max() > 0


def test_dropout_probabilities_stored_as_numbers_are_zeroed(make_trainer: Any, tokenizer: Any) -> None:
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": len(tokenizer), "attn_pdrop": 0.5}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    trainer = make_trainer(GPTBigCodeForCausalLM(GPTBigCodeConfig(**shape, **ends)), num_layers_unfrozen=None)
    policy, ids = trainer.model.policy.train(), torch.arange(5, 15)[None]
    torch.testing.assert_close(policy(ids).logits, policy(ids).logits, atol=0, rtol=0)
