"""Tests of reward functions: async functions, token rewards and errors; and of policies with unusual heads."""

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
TIMEOUT = 20  # seconds; reached only if functions that should run concurrently run one after the other


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]


def halves(completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    """Return a reward for each token."""
    return [[token / 256 - 0.5 for token in ids] for ids in completion_ids]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two state dicts are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Async functions.


def test_async_rewards_run_concurrently_and_receive_every_column(make_trainer: Make, recorder: type) -> None:
    """Three functions, one of them not async, each wait for the other two; in sequence none would return."""
    barrier = threading.Barrier(3)

    async def letters(answer: list[str], **columns: Any) -> list[float]:
        await asyncio.to_thread(barrier.wait, TIMEOUT)
        return [float(ord(letter)) for letter in answer]

    async def levels(level: list[int], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        await asyncio.to_thread(barrier.wait, TIMEOUT)
        return [value + len(ids) for value, ids in zip(level, completion_ids, strict=True)]

    def plain(prompts: list[str], **columns: Any) -> list[float]:
        barrier.wait(TIMEOUT)
        return [float(prompt.removeprefix("Question ")) for prompt in prompts]

    rows = [{"prompt": f"Question {row}", "answer": chr(97 + row), "level": 10 * row} for row in range(8)]
    trainer = make_trainer(None, [letters, plain, levels], rows=rows, trainer_class=recorder, max_steps=1)
    trainer.train()
    (scored,), (_, queries, answers) = trainer.scored, trainer.generated[0]
    numbers = [int(bytes(query).decode().removeprefix("Question ")) for query in queries]
    assert list(scored) == ["letters", "plain", "levels"] and sorted(numbers) == list(range(8))
    assert scored["letters"] == [97 + number for number in numbers] and scored["plain"] == numbers
    lengths = [len(ids) for ids in answers.ids]
    assert scored["levels"] == [10 * number + length for number, length in zip(numbers, lengths, strict=True)]


def test_async_rewards_work_inside_a_running_event_loop(make_trainer: Make, recorder: type) -> None:
    """As in a notebook: an async function, and a plain function that returns an awaitable."""

    async def lengths_of(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        started, all_started = [], asyncio.Event()

        async def length_of(ids: list[int]) -> float:
            started.append(ids)
            if len(started) == len(completion_ids):
                all_started.set()
            await asyncio.wait_for(all_started.wait(), TIMEOUT)
            return float(len(ids))

        return await asyncio.gather(*map(length_of, completion_ids))

    def awaitable(**columns: Any) -> Any:
        return lengths_of(**columns)

    trainer = make_trainer(None, [lengths_of, awaitable], trainer_class=recorder, max_steps=1)

    async def notebook() -> Any:
        return trainer.train()

    assert asyncio.run(notebook()).global_step == 1
    lengths = [float(len(ids)) for ids in trainer.generated[0][2].ids]
    assert trainer.scored == [{"lengths_of": lengths, "awaitable": lengths}]


# Token rewards.


def test_token_rewards_are_added_at_their_tokens(make_trainer: Make, recorder: type) -> None:
    """Compute the rewards of the second update by hand: token rewards, an answer reward and the KL penalty."""
    trainer = make_trainer(
        None, [halves, low_share], trainer_class=recorder, reward_weights=[0.5, 2.0], kl_coef=0.3, learning_rate=3e-3
    )
    trainer.train()
    expected_rewards = {}
    for update, (_, queries, answers) in enumerate(trainer.generated):
        for query, ids in zip(queries, answers.ids, strict=True):
            rewards = [0.5 * (token / 256 - 0.5) for token in ids]
            rewards[-1] += 2 * sum(token < 128 for token in ids) / len(ids)
            expected_rewards[update, (*query, *ids)] = rewards
    inputs = trainer.steps[-1].inputs
    total_kl = 0.0
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        rewards = expected_rewards[1, tuple(ids[mask.bool()].tolist())]
        kl = (inputs["log_probs"] - inputs["reference_log_probs"])[row, : len(rewards)].tolist()
        expected = [reward - 0.3 * token_kl for reward, token_kl in zip(rewards, kl, strict=True)]
        assert inputs["rewards"][row, : len(rewards)].tolist() == pytest.approx(expected, abs=1e-6)
        assert not inputs["rewards"][row, len(rewards) :].any()
        assert inputs["scores"][row].item() == pytest.approx(sum(rewards), abs=1e-6)
        total_kl += sum(map(abs, kl))
    assert total_kl > 0.1
    for update, score in enumerate(logged(trainer, "objective/scores")):
        sums = [sum(rewards) for (number, _), rewards in expected_rewards.items() if number == update]
        assert score == pytest.approx(sum(sums) / 8, abs=1e-6)
    sums = [sum(token / 256 - 0.5 for token in ids) for ids in trainer.generated[0][2].ids]
    assert logged(trainer, "rewards/halves")[0] == pytest.approx(sum(sums) / 8, abs=1e-9)


def test_a_reward_of_the_last_token_equals_a_reward_of_the_answer(make_trainer: Make, weights_of: Make) -> None:
    """Bit for bit, for token rewards as lists, arrays and tensors."""

    def last_token_reward(container: Any) -> Any:
        def reward(completion_ids: list[list[int]], **columns: Any) -> list[Any]:
            scores = zip(completion_ids, low_share(completion_ids), strict=True)
            return [container([0.0] * (len(ids) - 1) + [score]) for ids, score in scores]

        return reward

    tensor = partial(torch.tensor, dtype=torch.float64)
    weights = []
    for function in (low_share, *map(last_token_reward, (list, np.array, tensor))):
        trainer = make_trainer(None, function, kl_coef=0.2, num_mini_batches=2, num_ppo_epochs=1)
        initial = weights_of(trainer.model)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert not same(initial, weights[0])
    assert [same(weights[0], other) for other in weights[1:]] == [True] * 3


# Errors of functions.


def failing_lookup(prompt: str) -> float:
    raise LookupError(prompt)


ERROR_LINE = rf"{Path(__file__).name}:{inspect.getsourcelines(failing_lookup)[1] + 1}"
ERRORS: dict[str, tuple[Any, str]] = {
    "None": (lambda prompt: None, "returned None"),
    "NaN": (lambda prompt: float("nan"), "returned nan"),
    "text": (lambda prompt: "good", "returned 'good'"),
    "NaN of a token": (lambda prompt: [0.0, float("nan")], "returned nan"),
    "None of a token": (lambda prompt: [0.0, None], "returned None"),
    "list of a token": (lambda prompt: [0.0, [1.0]], r"returned \[1.0\]"),
    "one token too few": (lambda prompt: np.zeros(1), r"returned 1 token rewards .* has 2 tokens \(completion_ids\)"),
    "no tokens": (lambda prompt: [], "returned 0 token rewards"),
    "raises": (failing_lookup, rf"raised LookupError: Question 5 \(.*{ERROR_LINE}\)"),
}


@pytest.fixture(scope="module")
def score_with(trainers_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """Return a function (reward function) that returns a trainer's scores of the answer "Hi" to eight questions."""
    rows = [{"prompt": f"Question {row}"} for row in range(8)]
    functions: list[Any] = []

    def current_reward(**columns: Any) -> Any:
        return functions[-1](**columns)

    trainer = trainers_in(tmp_path_factory.mktemp("scores"))(None, current_reward, rows=rows)

    def score(function: Any) -> Any:
        functions.append(function)
        completions = Completions([[72, 105]] * 8, [False] * 8)
        return trainer.score(trainer.prompts.rows(range(8)), completions)["current_reward"]

    return score


@pytest.mark.parametrize("case", ERRORS)
def test_reward_errors_name_the_function_and_the_sample(score_with: Callable[[Any], Any], case: str) -> None:
    result_for, message = ERRORS[case]

    def plain(prompts: list[str], **columns: Any) -> list[Any]:
        return [result_for(prompt) if prompt == "Question 5" else 0.5 for prompt in prompts]

    def generator(prompts: list[str], **columns: Any) -> Any:
        yield from plain(prompts)

    async def asynchronous(**columns: Any) -> list[Any]:
        await asyncio.sleep(0)
        return plain(**columns)

    for function in (plain, generator, asynchronous):
        with pytest.raises(UserError, match=f"reward function current_reward {message}") as raised:
            score_with(function)
        assert "the completion 'Hi' of the prompt 'Question 5'" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [([0.0] * 7, "7 scores for 8"), ([], "0 scores for 8"), (None, "None for 8"), (0.5, "0.5 for 8")],
    ids=["seven", "none", "None", "one number"],
)
def test_a_reward_function_must_return_one_score_per_completion(
    score_with: Callable[[Any], Any], result: Any, message: str
) -> None:
    with pytest.raises(UserError, match=f"reward function current_reward returned {message} completions; return"):
        score_with(lambda **columns: result)


def test_scores_of_every_number_type_are_accepted(score_with: Callable[[Any], Any]) -> None:
    for number in (int, bool, np.float32, np.bool_, np.array, torch.tensor):
        assert score_with(lambda prompts, number=number, **columns: [number(1)] * len(prompts)) == [1.0] * 8
    for scores in (np.ones(8), torch.ones(8, dtype=torch.bfloat16), tuple([1] * 8), np.ones(8, dtype=bool)):
        assert score_with(lambda scores=scores, **columns: scores) == [1.0] * 8


def test_a_reward_error_during_training_names_the_function(make_trainer: Make) -> None:
    async def fails_later(prompts: list[str], **columns: Any) -> list[float]:
        return [failing_lookup(prompt) if prompt == "Question 5" else 0.0 for prompt in prompts]

    rows = [{"prompt": f"Question {row}"} for row in range(8)]
    with pytest.raises(UserError, match=rf"reward function fails_later {ERRORS['raises'][1]}.*of the prompt 'Quest"):
        make_trainer(None, [low_share, fails_later], rows=rows).train()


def test_a_policy_that_changes_its_logits_after_the_head_is_refused(make_policy: Any, make_trainer: Any) -> None:
    """Log-probabilities are computed from the head, so a later change of the logits would be ignored."""
    model = make_policy(initializer_range=0.3)
    forward = model.forward

    def soft_capped(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = 3 * torch.tanh(outputs.logits / 3)
        return outputs

    model.forward = soft_capped
    with pytest.raises(UserError, match="changes the logits of its head in a way that PPOTrainer does not know"):
        make_trainer(model)


def test_value_head_has_the_width_of_the_projected_last_states(make_trainer: Any, tokenizer: Any) -> None:
    """As in facebook/opt-350m: hidden states of width 1024, projected to 512 before the head."""
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
