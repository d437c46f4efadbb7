"""Sampling: the distribution that is drawn from, where it stops, and that a row never depends on its neighbours."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_recipes.generation.sampling import Completions, Sampling, generate, row_seed, sample, stop_ids

STOPS = tuple(range(200, 256))
PROMPTS = [[65 + row] * (1 + 3 * row % 7) for row in range(8)]
LEFT_OVER = {
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
    """Sharp enough that the likeliest tokens differ from the others."""
    return make_model(3, initializer_range=0.3)


@pytest.fixture(scope="module")
def letters(make_model: Callable[..., Any]) -> Any:
    """Knows ten tokens only, so that a few thousand draws show its distribution."""
    return make_model(1, vocab_size=10, n_embd=16, initializer_range=0.6, eos_token_id=None, pad_token_id=None)


def next_probabilities(model: Any, prompt: list[int], temperature: float) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    weights = [math.exp(logit / temperature) for logit in logits.tolist()]
    return [weight / sum(weights) for weight in weights]


def drawn_shares(model: Any, sampling: Sampling, draws: int = 4000) -> list[float]:
    seeds = [row_seed(11, index) for index in range(draws)]
    found = Counter(ids[0] for ids in sample(model, [[1, 2, 3]] * draws, sampling, seeds, batch_size=1000).ids)
    return [found[token] / draws for token in range(10)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_tempered_model(letters: Any, temperature: float) -> None:
    shares = drawn_shares(letters, Sampling(1, temperature))
    expected = next_probabilities(letters, [1, 2, 3], temperature)
    for share, probability in zip(shares, expected, strict=True):  # within 4.5 standard errors
        assert share == pytest.approx(probability, abs=4.5 * math.sqrt(probability * (1 - probability) / 4000) + 1e-4)


def test_top_k_and_top_p_cut_the_tail_and_keep_the_proportions(letters: Any) -> None:
    probabilities = next_probabilities(letters, [1, 2, 3], 1.0)
    order = sorted(range(10), key=lambda token: -probabilities[token])
    for sampling, kept in (
        (Sampling(1, top_k=3), order[:3]),
        (Sampling(1, top_p=sum(probabilities[token] for token in order[:4]) - 0.01), order[:4]),
        (Sampling(1, top_p=1e-6), order[:1]),
    ):
        shares, total = drawn_shares(letters, sampling), sum(probabilities[token] for token in kept)
        assert {token for token in range(10) if shares[token]} == set(kept)
        for token in kept:
            assert shares[token] == pytest.approx(probabilities[token] / total, abs=0.04)


def test_temperature_zero_is_the_greedy_answer_of_transformers(model: Any) -> None:
    answers = sample(model, PROMPTS, Sampling(6, temperature=0.0, stop_ids=(256,)), [0] * 8, batch_size=3)
    for prompt, answer in zip(PROMPTS, answers.ids, strict=True):
        asked = torch.tensor([prompt])
        whole = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=6, do_sample=False)
        assert answer == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_point_10_a_row_alone_is_answered_as_in_its_batch(model: Any, batch_size: int) -> None:
    sampling = Sampling(12, 1.0, stop_ids=STOPS)
    seeds = [row_seed(5, row) for row in range(8)]
    together = sample(model, PROMPTS, sampling, seeds, batch_size=8)
    assert len({len(ids) for ids in together.ids}) > 2, "answers of several lengths"
    apart = sample(model, PROMPTS, sampling, seeds, batch_size=batch_size)
    assert apart == together
    for row in range(8):
        assert sample(model, [PROMPTS[row]], sampling, [seeds[row]]).ids[0] == together.ids[row]
    back = sample(model, PROMPTS[::-1], sampling, seeds[::-1])
    assert back.ids[::-1] == together.ids


def test_point_10_and_so_is_a_row_by_a_model_whose_weights_are_laid_out_for_the_processor(
    make_model: Callable[..., Any],
) -> None:
    model = make_model(3, initializer_range=0.1, n_embd=256, vocab_size=320)
    seeds = [row_seed(5, row) for row in range(8)]
    sampling = Sampling(12, 1.0, stop_ids=STOPS)
    together = sample(model, PROMPTS, sampling, seeds, batch_size=8)
    for row in range(8):
        assert sample(model, [PROMPTS[row]], sampling, [seeds[row]]).ids[0] == together.ids[row]
    assert not any("forward" in vars(each) for each in model.modules()), "nothing of it is left on the model"


def test_an_answer_ends_with_its_first_stop_token_or_at_the_limit(model: Any) -> None:
    answers = sample(model, PROMPTS * 8, Sampling(5, 1.5, stop_ids=STOPS), list(range(64)))
    assert {True, False} == set(answers.stopped)
    for ids, stopped in zip(answers.ids, answers.stopped, strict=True):
        assert not any(token in STOPS for token in ids[:-1])
        assert stopped == (ids[-1] in STOPS)
        assert len(ids) == 5 or stopped
    assert max(len(ids) for ids in answers.ids) == 5


def test_more_room_only_lengthens_what_had_not_ended(model: Any) -> None:
    seeds = list(range(8))
    short, long = (sample(model, PROMPTS, Sampling(length, 1.0, stop_ids=STOPS), seeds) for length in (4, 9))
    for before, after, stopped in zip(short.ids, long.ids, short.stopped, strict=True):
        assert after[: len(before)] == before and (not stopped or after == before)


def test_a_seed_decides_and_another_seed_differs(model: Any) -> None:
    sampling = Sampling(8, 1.0)
    torch.manual_seed(1)
    first = sample(model, PROMPTS, sampling, list(range(8)))
    torch.manual_seed(2)
    assert sample(model, PROMPTS, sampling, list(range(8))) == first
    assert sample(model, PROMPTS, sampling, list(range(8, 16))) != first
    assert len({tuple(ids) for ids in sample(model, [[65]] * 8, sampling, list(range(8))).ids}) == 8
    assert len({row_seed(seed, index) for seed in range(50) for index in range(-1, 50)}) == 50 * 51


def test_point_02_a_left_over_generation_config_changes_no_draw(make_model: Callable[..., Any]) -> None:
    plain, marked = make_model(3, initializer_range=0.3), make_model(3, initializer_range=0.3)
    for name, value in LEFT_OVER.items():
        setattr(marked.generation_config, name, value)
    sampling = Sampling(8, 0.9, stop_ids=STOPS)
    seeds = list(range(8))
    assert sample(marked, PROMPTS, sampling, seeds) == sample(plain, PROMPTS, sampling, seeds)


def test_the_model_comes_back_in_the_mode_it_had(model: Any) -> None:
    for training in (True, False):
        model.train(training)
        sample(model, PROMPTS[:2], Sampling(2), [0, 1])
        assert model.training is training
    model.train()
    with pytest.raises(IndexError):
        sample(model, [[10**6]], Sampling(2), [0])
    assert model.training
    model.eval()


def test_point_04_every_eos_id_of_the_generation_config_stops(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model = make_model()
    assert stop_ids(model) == (256,)
    model.generation_config.eos_token_id = [3, 4]
    assert stop_ids(model, tokenizer) == (3, 4)
    model.generation_config.eos_token_id = 5
    assert stop_ids(model, tokenizer) == (5,)
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == (256,), "the config's"
    model.config.eos_token_id = None
    assert stop_ids(model, tokenizer) == (tokenizer.eos_token_id,)
    assert stop_ids(model) == ()


def test_text_messages_and_ids_are_answered_alike(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    text = tokenizer.decode(ids)
    asked: dict[str, Any] = {"max_new_tokens": 6, "seed": 4}
    answers = [generate(model, tokenizer, [prompt], **asked) for prompt in (messages, text, ids)]
    assert answers[0] == answers[1] == answers[2] and answers[0] != [""]
    several = generate(model, tokenizer, ["a", "bb", "ccc"], batch_size=1, **asked)
    assert several == generate(model, tokenizer, ["a", "bb", "ccc"], batch_size=3, **asked)
    assert several != generate(model, tokenizer, ["a", "bb", "ccc"], max_new_tokens=6, seed=5)


def test_texts_leave_special_tokens_out(tokenizer: Any) -> None:
    answers = Completions([[72, 105, 256], [256], [72, 261, 105]], [True, True, False])
    assert answers.texts(tokenizer) == ["Hi", "", "Hi"]
