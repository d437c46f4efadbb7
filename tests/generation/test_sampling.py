"""Sampling: the distribution of tokens, stop tokens, and completions that do not depend on the batch."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_recipes.generation.sampling import Completions, Sampling, generate, row_seed, sample, stop_ids

STOPS = tuple(range(200, 256))
PROMPTS = [[65 + row] * (1 + 3 * row % 7) for row in range(8)]
LEFTOVER = {
    "do_sample": True,
    "repetition_penalty": 1.8,
    "top_p": 0.3,
    "top_k": 2,
    "temperature": 0.2,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[9]],
    "min_new_tokens": 4,
    "max_new_tokens": 2,
}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """Return a model with sharp distributions: its most likely tokens differ clearly from the others."""
    return make_model(3, initializer_range=0.3)


@pytest.fixture(scope="module")
def ten_token_model(make_model: Callable[..., Any]) -> Any:
    """Return a model with ten tokens only, so that a few thousand samples show its distribution."""
    return make_model(1, vocab_size=10, n_embd=16, initializer_range=0.6, eos_token_id=None, pad_token_id=None)


def next_probabilities(model: Any, prompt: list[int], temperature: float) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    weights = [math.exp(logit / temperature) for logit in logits.tolist()]
    return [weight / sum(weights) for weight in weights]


def token_frequencies(model: Any, sampling: Sampling, draws: int = 4000) -> list[float]:
    seeds = [row_seed(11, index) for index in range(draws)]
    counts = Counter(ids[0] for ids in sample(model, [[1, 2, 3]] * draws, sampling, seeds, batch_size=1000).ids)
    return [counts[token] / draws for token in range(10)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_tempered_distribution(ten_token_model: Any, temperature: float) -> None:
    frequencies = token_frequencies(ten_token_model, Sampling(1, temperature))
    expected = next_probabilities(ten_token_model, [1, 2, 3], temperature)
    for frequency, probability in zip(frequencies, expected, strict=True):  # within 4.5 standard errors
        assert frequency == pytest.approx(
            probability, abs=4.5 * math.sqrt(probability * (1 - probability) / 4000) + 1e-4
        )


def test_top_k_and_top_p_truncate_and_renormalize_the_distribution(ten_token_model: Any) -> None:
    probabilities = next_probabilities(ten_token_model, [1, 2, 3], 1.0)
    order = sorted(range(10), key=lambda token: -probabilities[token])
    for sampling, kept in (
        (Sampling(1, top_k=3), order[:3]),
        (Sampling(1, top_p=sum(probabilities[token] for token in order[:4]) - 0.01), order[:4]),
        (Sampling(1, top_p=1e-6), order[:1]),
    ):
        frequencies, total = token_frequencies(ten_token_model, sampling), sum(probabilities[token] for token in kept)
        assert {token for token in range(10) if frequencies[token]} == set(kept)
        for token in kept:
            assert frequencies[token] == pytest.approx(probabilities[token] / total, abs=0.04)


def test_temperature_zero_equals_greedy_decoding_of_transformers(model: Any) -> None:
    answers = sample(model, PROMPTS, Sampling(6, temperature=0.0, stop_ids=(256,)), [0] * 8, batch_size=3)
    for prompt, answer in zip(PROMPTS, answers.ids, strict=True):
        input_ids = torch.tensor([prompt])
        greedy = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=6, do_sample=False
        )
        assert answer == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_completions_do_not_depend_on_the_batch(model: Any, batch_size: int) -> None:
    sampling = Sampling(12, 1.0, stop_ids=STOPS)
    seeds = [row_seed(5, row) for row in range(8)]
    whole_batch = sample(model, PROMPTS, sampling, seeds, batch_size=8)
    assert len({len(ids) for ids in whole_batch.ids}) > 2, "the completions have several lengths"
    in_batches = sample(model, PROMPTS, sampling, seeds, batch_size=batch_size)
    assert in_batches == whole_batch
    for row in range(8):
        assert sample(model, [PROMPTS[row]], sampling, [seeds[row]]).ids[0] == whole_batch.ids[row]
    reversed_order = sample(model, PROMPTS[::-1], sampling, seeds[::-1])
    assert reversed_order.ids[::-1] == whole_batch.ids


def test_completions_with_prepacked_weights_do_not_depend_on_the_batch(
    make_model: Callable[..., Any],
) -> None:
    model = make_model(3, initializer_range=0.1, n_embd=256, vocab_size=320)
    seeds = [row_seed(5, row) for row in range(8)]
    sampling = Sampling(12, 1.0, stop_ids=STOPS)
    whole_batch = sample(model, PROMPTS, sampling, seeds, batch_size=8)
    for row in range(8):
        assert sample(model, [PROMPTS[row]], sampling, [seeds[row]]).ids[0] == whole_batch.ids[row]
    assert not any("forward" in vars(module) for module in model.modules()), "the prepacked forwards are removed"


def test_a_completion_ends_at_its_first_stop_token_or_at_max_new_tokens(model: Any) -> None:
    answers = sample(model, PROMPTS * 8, Sampling(5, 1.5, stop_ids=STOPS), list(range(64)))
    assert {True, False} == set(answers.stopped)
    for ids, stopped in zip(answers.ids, answers.stopped, strict=True):
        assert not any(token in STOPS for token in ids[:-1])
        assert stopped == (ids[-1] in STOPS)
        assert len(ids) == 5 or stopped
    assert max(len(ids) for ids in answers.ids) == 5


def test_a_larger_limit_only_lengthens_unfinished_completions(model: Any) -> None:
    seeds = list(range(8))
    short, long = (sample(model, PROMPTS, Sampling(length, 1.0, stop_ids=STOPS), seeds) for length in (4, 9))
    for before, after, stopped in zip(short.ids, long.ids, short.stopped, strict=True):
        assert after[: len(before)] == before and (not stopped or after == before)


def test_row_seeds_decide_the_completions(model: Any) -> None:
    sampling = Sampling(8, 1.0)
    torch.manual_seed(1)
    first = sample(model, PROMPTS, sampling, list(range(8)))
    torch.manual_seed(2)
    assert sample(model, PROMPTS, sampling, list(range(8))) == first
    assert sample(model, PROMPTS, sampling, list(range(8, 16))) != first
    assert len({tuple(ids) for ids in sample(model, [[65]] * 8, sampling, list(range(8))).ids}) == 8
    assert len({row_seed(seed, index) for seed in range(50) for index in range(-1, 50)}) == 50 * 51


def test_leftover_generation_config_does_not_change_sampling(make_model: Callable[..., Any]) -> None:
    plain, marked = make_model(3, initializer_range=0.3), make_model(3, initializer_range=0.3)
    for name, value in LEFTOVER.items():
        setattr(marked.generation_config, name, value)
    sampling = Sampling(8, 0.9, stop_ids=STOPS)
    seeds = list(range(8))
    assert sample(marked, PROMPTS, sampling, seeds) == sample(plain, PROMPTS, sampling, seeds)


def test_sampling_restores_the_training_mode(model: Any) -> None:
    for training in (True, False):
        model.train(training)
        sample(model, PROMPTS[:2], Sampling(2), [0, 1])
        assert model.training is training
    model.train()
    with pytest.raises(IndexError):
        sample(model, [[10**6]], Sampling(2), [0])
    assert model.training
    model.eval()


def test_stop_ids_are_all_eos_ids_of_the_generation_config(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model = make_model()
    assert stop_ids(model) == (256,)
    model.generation_config.eos_token_id = [3, 4]
    assert stop_ids(model) == (3, 4)
    assert stop_ids(model, tokenizer) == (3, 4, 256), "the chat template ends an answer with 256"
    model.generation_config.eos_token_id = 5
    assert stop_ids(model) == (5,)
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == (256,), "the eos_token_id of the model's config"
    model.config.eos_token_id = None
    assert stop_ids(model, tokenizer) == (tokenizer.eos_token_id,)
    assert stop_ids(model) == ()


def test_prompts_as_text_messages_and_ids_give_equal_completions(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    text = tokenizer.decode(ids)
    options: dict[str, Any] = {"max_new_tokens": 6, "seed": 4}
    answers = [generate(model, tokenizer, [prompt], **options) for prompt in (messages, text, ids)]
    assert answers[0] == answers[1] == answers[2] and answers[0] != [""]
    several = generate(model, tokenizer, ["a", "bb", "ccc"], batch_size=1, **options)
    assert several == generate(model, tokenizer, ["a", "bb", "ccc"], batch_size=3, **options)
    assert several != generate(model, tokenizer, ["a", "bb", "ccc"], max_new_tokens=6, seed=5)


def test_texts_of_completions_omit_special_tokens(tokenizer: Any) -> None:
    answers = Completions([[72, 105, 256], [256], [72, 261, 105]], [True, True, False])
    assert answers.texts(tokenizer, [[65]] * 3) == ["Hi", "", "Hi"]


def test_progress_moves_with_every_step_and_ends_at_the_total(make_model: Any) -> None:
    """An answer that ends early needs none of its remaining tokens, so it counts in full."""
    model, moved = make_model(initializer_range=0.5), []
    sampling = Sampling(6, stop_ids=tuple(range(0, 200, 2)))
    rows = [[1, 2], [3], [4, 5, 6], [7]]
    answers = sample(model, rows, sampling, [11, 12, 13, 14], batch_size=3, advance=moved.append)
    assert sum(moved) == 4 * 6 and min(moved) >= 1 and len(moved) >= max(map(len, answers.ids))
    assert {len(answer) for answer in answers.ids} != {6}, "some answers end early"
