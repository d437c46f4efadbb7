"""Metrics against examples computed by hand and float64 NumPy; they do not depend on padding, batches or order."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss
from torch import Tensor
from transformers import EvalPrediction

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.evaluation.classification import classification_metrics, compute_classification_metrics
from rlhf_recipes.evaluation.comparison import mean_with_interval, win_rate
from rlhf_recipes.evaluation.divergence import sequence_kl
from rlhf_recipes.evaluation.language_model import completion_perplexity, perplexity
from rlhf_recipes.evaluation.models import METRICS, Evaluation, compare, completion_log_probs, evaluate_model
from rlhf_recipes.evaluation.preference import calibration_table, preference_metrics
from rlhf_recipes.evaluation.text import distinct_n, eos_share, length_statistics, split_words
from rlhf_recipes.generation.sampling import Sampling
from rlhf_recipes.scoring.reward import load_reward

VOCABULARY = 262
TEXTS = ["the mill lies by the river, where it has always been", "", "é", "nobody <|user|> was seen", "a"]


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert split_words("I like 東京タワー。ok") == ["I", "like", "東", "京", "タ", "ワ", "ー", "。", "ok"]
    assert split_words("สวัสดี 한국어 단어") == ["ส", "วั", "ส", "ดี", "한국어", "단어"], "Korean writes spaces"
    assert split_words("か\u3099") == ["か\u3099"], "a mark stays with its character"
    assert distinct_n(["好好学习天天向上"], 1) == 6 / 8 and distinct_n(["天天天天"], 2) == 1 / 3


def test_distinct_n_counts_over_all_texts_but_not_across_texts() -> None:
    texts = ["a b a b", "b  a\n", "", "c"]
    assert distinct_n(texts, 1) == 3 / 7  # a b a b | b a | c
    assert distinct_n(texts, 2) == 2 / 4  # ab ba ab | ba; neither "b b" nor "a c"
    assert distinct_n(texts, 3) == 1.0  # aba, bab
    assert distinct_n(texts, 5) == distinct_n([""], 1) == 0.0
    assert distinct_n(texts[::-1]) == 0.5 and distinct_n(texts * 2, 1) == 3 / 14


def test_lengths_and_eos_share_by_hand() -> None:
    """The 90th percentile of 1 to 6 lies 0.9 * 5 = 4.5 steps above the lowest."""
    assert length_statistics([6, 1, 3, 2, 5, 4]) == {"mean": 3.5, "median": 3.5, "p90": pytest.approx(5.5)}
    assert length_statistics([7]) == {"mean": 7.0, "median": 7.0, "p90": 7.0}
    assert length_statistics([0, 0, 9]) == {"mean": 3.0, "median": 0.0, "p90": pytest.approx(7.2)}
    assert eos_share([True, False, False, True, True]) == 0.6 and eos_share([False]) == 0.0


def test_win_rate_by_hand() -> None:
    result = win_rate([2.0, 1.0, -1.0, 0.0], [1.0, 1.0, -3.0, 5.0])
    assert (result["win_rate"], result["wins"], result["ties"], result["losses"]) == (0.625, 2, 1, 1)
    swapped = win_rate([1.0, 1.0, -3.0, 5.0], [2.0, 1.0, -1.0, 0.0])
    assert swapped["win_rate"] == 0.375 and (swapped["wins"], swapped["losses"]) == (1, 2)
    assert (swapped["low"], swapped["high"]) == pytest.approx((1 - result["high"], 1 - result["low"]))
    textbook = win_rate([1.0] * 8 + [0.0] * 2, [0.5] * 10)
    assert (textbook["low"], textbook["high"]) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@pytest.mark.parametrize(("confidence", "z"), [(0.5, 0.6744898), (0.9, 1.6448536), (0.99, 2.5758293)])
@pytest.mark.parametrize(("wins", "count"), [(0, 1), (1, 1), (3, 7), (40, 40), (199, 400)])
def test_win_rate_has_the_wilson_interval(wins: int, count: int, confidence: float, z: float) -> None:
    """The bounds p solve (share - p)^2 = z^2 p (1 - p) / count (Wilson 1927), one on each side of the share."""
    result = win_rate([1.0] * wins + [0.0] * (count - wins), [0.5] * count, confidence=confidence)
    share = wins / count
    assert 0 <= result["low"] <= share <= result["high"] <= 1 and result["low"] < result["high"]
    for bound in (result["low"], result["high"]):
        assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / count, rel=1e-6, abs=1e-12)


def test_bootstrap_interval_of_two_values_by_hand() -> None:
    """Resamples of (0, 1) have the mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    assert mean_with_interval([0, 1], confidence=0.4) == {"mean": 0.5, "low": 0.5, "high": 0.5, "count": 2}
    assert mean_with_interval([1, 0], confidence=0.6) == {"mean": 0.5, "low": 0.0, "high": 1.0, "count": 2}
    assert mean_with_interval([3.5]) == {"mean": 3.5, "low": 3.5, "high": 3.5, "count": 1}


def test_bootstrap_interval_of_many_values_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(5, 2, size=400)
    first, again, other = (
        mean_with_interval(values.tolist(), confidence=0.9, resamples=4000, seed=seed) for seed in (0, 0, 1)
    )
    half_width = 1.6448536 * values.std() / 20
    assert first["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert first["high"] - values.mean() == pytest.approx(half_width, rel=0.05)
    assert values.mean() - first["low"] == pytest.approx(half_width, rel=0.05)
    assert first == again and first["low"] != other["low"]


def test_preference_metrics_by_hand() -> None:
    """Probabilities of the chosen answer: 2/3, 1/3 and a tie. Confidences: 2/3 twice, right once; 1/2 once."""
    chosen, rejected = [math.log(2), 1.0, 7.0], [0.0, 1.0 + math.log(2), 7.0]
    metrics = preference_metrics(chosen, rejected, [3, 5, 6], [2, 5, 4])
    expected = {"accuracy": 0.5, "margin": 0, "longer_accuracy": 5 / 6, "calibration_error": 1 / 9, "brier": 29 / 108}
    assert metrics == pytest.approx(expected, abs=1e-12)
    tie, confident = calibration_table(chosen, rejected)
    assert tie == pytest.approx({"low": 0.5, "high": 0.55, "confidence": 0.5, "accuracy": 0.5, "count": 1})
    assert confident == pytest.approx({"low": 0.65, "high": 0.7, "confidence": 2 / 3, "accuracy": 0.5, "count": 2})


@pytest.mark.parametrize("bins", [1, 4, 10, 33])
def test_calibration_equals_that_of_a_classifier_on_both_orders(bins: int) -> None:
    """The classifier sees each pair in both orders with labels 1 and 0, in twice as many bins of [0, 1]."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.4, 2, 500), rng.normal(0, 2, 500)
    metrics = preference_metrics(chosen.tolist(), rejected.tolist(), [1] * 500, [1] * 500, bins)
    probability = 1 / (1 + np.exp(np.concatenate([rejected - chosen, chosen - rejected])))
    label = np.repeat([1.0, 0.0], 500)
    bin_of = np.digitize(probability, np.linspace(0, 1, 2 * bins + 1)[1:-1])
    gaps = [abs((probability - label)[bin_of == number].sum()) for number in range(2 * bins)]
    assert metrics["calibration_error"] == pytest.approx(sum(gaps) / 1000, abs=1e-12)
    assert metrics["brier"] == pytest.approx(brier_score_loss(label, probability))
    assert metrics["accuracy"] == (probability[:500] > 0.5).mean()
    table = calibration_table(chosen.tolist(), rejected.tolist(), bins)
    in_their_bin = sum(row["count"] for row in table if row["low"] <= row["confidence"] <= row["high"])
    assert in_their_bin == 500, "every pair is in the bin of its confidence"


def test_preference_metrics_of_a_certain_reward_model() -> None:
    right = preference_metrics([1e4, 9e3], [0.0, -1e4], [1, 1], [1, 1])
    assert right == {"accuracy": 1, "margin": 14500, "longer_accuracy": 0.5, "calibration_error": 0, "brier": 0}
    wrong = preference_metrics([0.0], [1e4], [1], [2])
    assert wrong == {"accuracy": 0, "margin": -1e4, "longer_accuracy": 0, "calibration_error": 1, "brier": 1}
    assert [(row["low"], row["high"]) for row in calibration_table([1e4, 2e4], [0, 0])] == [(0.95, 1)]


def metrics_by_counting(predicted: Sequence[int], expected: Sequence[int], average: str) -> Any:
    """Return accuracy, and precision, recall and F1 with this average, from counts of predicted and expected labels."""
    pairs = list(zip(predicted, expected, strict=True))
    scores: list[tuple[float, float, float]] = []
    labels = [1] if average == "binary" else sorted({*predicted, *expected})
    for label in labels:
        hits = pairs.count((label, label))
        predicted_count, expected_count = list(predicted).count(label), list(expected).count(label)
        f1 = 2 * hits / (predicted_count + expected_count) if predicted_count + expected_count else 0.0
        scores.append(
            (hits / predicted_count if predicted_count else 0.0, hits / expected_count if expected_count else 0.0, f1)
        )
    weights = [list(expected).count(label) for label in labels] if average == "weighted" else [1] * len(labels)
    precision, recall, f1 = np.average(scores, axis=0, weights=weights)
    share = sum(label == other for label, other in pairs) / len(pairs)
    return pytest.approx({"accuracy": share, "precision": precision, "recall": recall, "f1": f1})


@pytest.mark.parametrize("average", ["binary", "macro", "weighted"])
@pytest.mark.parametrize(
    ("predicted", "expected"), [("1100101", "1001100"), ("0", "1"), ("1111", "1000"), ("00", "00")]
)
def test_classification_metrics_match_counts_by_hand(predicted: str, expected: str, average: str) -> None:
    """The cases include a constant prediction, a single row, and a label that is never predicted."""
    predictions, labels = [int(digit) for digit in predicted], [int(digit) for digit in expected]
    assert classification_metrics(predictions, labels, average) == metrics_by_counting(predictions, labels, average)
    assert classification_metrics(predictions, labels) == metrics_by_counting(predictions, labels, "binary")


def test_more_than_two_labels_use_the_macro_average() -> None:
    predicted, expected = [0, 2, 2, 1, 0, 0, 5], [0, 2, 1, 1, 0, 2, 0]
    assert classification_metrics(predicted, expected) == metrics_by_counting(predicted, expected, "macro")
    assert classification_metrics([0, 2], [0, 1]) == metrics_by_counting([0, 2], [0, 1], "macro")
    micro = classification_metrics(predicted[::-1], expected[::-1], "micro")
    assert list(micro.values()) == pytest.approx([4 / 7] * 4), (
        "with one label a row, every micro average is the accuracy"
    )


def test_logits_are_converted_to_labels() -> None:
    """Two logits and their difference give equal metrics; the number of logits selects the average."""
    two = np.array([[0.2, 1.0], [3.0, -1.0], [-2.0, -3.0], [0.0, 0.5]])
    predicted, expected = [1, 0, 0, 1], [1, 0, 1, 1]
    measure: Callable[..., Any] = compute_classification_metrics
    for logits in (two, two[:, 1] - two[:, 0], two[:, 1:] - two[:, :1], (two, "hidden states")):
        for labels in (np.array(expected), np.array(expected)[:, None]):
            assert measure(EvalPrediction(logits, labels)) == metrics_by_counting(predicted, expected, "binary")
    three = np.hstack([two, np.full((4, 1), -9.0)])
    assert measure(EvalPrediction(three, np.array(expected))) == metrics_by_counting(predicted, expected, "macro")


class CountingModel(torch.nn.Module):
    """Predict every token but 0 after h tokens with a loss of h + log(262) nats; id 0 gets the remaining probability."""

    def __init__(self, context: int | None = 64) -> None:
        super().__init__()
        self.config, self.device = SimpleNamespace(max_position_embeddings=context), torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        history = attention_mask.cumsum(dim=1).double()
        logits = torch.zeros(*input_ids.shape, VOCABULARY, dtype=torch.float64)
        logits[..., 0] = history + torch.log(VOCABULARY - (VOCABULARY - 1) * torch.exp(-history))
        return SimpleNamespace(logits=logits)


COUNTING: Any = CountingModel()


def history_of(result: dict[str, float]) -> Any:
    """Return the sum of h over all predicted tokens; see CountingModel."""
    return pytest.approx((result["loss"] - math.log(VOCABULARY)) * result["tokens"], rel=1e-4)


def test_perplexity_averages_over_tokens_not_texts(tokenizer: Any) -> None:
    """Texts of 3, 0 and 1 tokens, each after a start token: 1 + 2 + 3 and 1."""
    result = perplexity(COUNTING, tokenizer, ["abc", "", "<|user|>"])
    nats = 7 + 4 * math.log(VOCABULARY)
    assert (result["tokens"], result["bytes"]) == (4, 3 + 8)
    assert result["loss"] == pytest.approx(nats / 4, rel=1e-6)
    assert result["perplexity"] == pytest.approx(VOCABULARY * math.exp(7 / 4), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 11, rel=1e-6)
    assert perplexity(COUNTING, tokenizer, ["é"])["bytes"] == 2
    unlimited: Any = CountingModel(context=None)
    assert perplexity(unlimited, tokenizer, ["a" * 1500], max_length=1501)["perplexity"] == math.inf


def test_perplexity_of_a_long_text_uses_overlapping_windows(tokenizer: Any, make_model: Callable[..., Any]) -> None:
    """Windows (begin, end, first scored token) of 11 ids in a context of 4, each computed alone in float64."""
    model, ids, nats = make_model(0, initializer_range=0.2), torch.tensor([256, *b"abcdefghij"]), 0.0
    for begin, end, first in [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8), (7, 11, 10)]:
        log_probs = model(ids[None, begin:end]).logits[0].detach().double().log_softmax(dim=-1)
        nats -= sum(float(log_probs[position - 1 - begin, ids[position]]) for position in range(first, end))
    result = perplexity(model, tokenizer, ["abcdefghij"], max_length=4)
    assert result["perplexity"] == pytest.approx(math.exp(nats / 10), rel=1e-5)
    for length, history in ((None, 55), (4, 1 + 2 + 3 + 3 * (2 + 3) + 3), (2, 10)):
        result = perplexity(COUNTING, tokenizer, ["abcdefghij"], max_length=length)
        assert result["tokens"] == 10 and history_of(result) == history


def test_perplexity_does_not_depend_on_padding_batch_order_or_dropout(
    tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    model = make_model(0, initializer_range=0.2, resid_pdrop=0.5)
    for length in (None, 9):
        unbatched = perplexity(model, tokenizer, TEXTS, batch_size=1, max_length=length)
        for texts, size in ((TEXTS, 2), (TEXTS[::-1], 3), (TEXTS, 64)):
            batched = perplexity(model.train(), tokenizer, texts, batch_size=size, max_length=length)
            assert batched == pytest.approx(unbatched, rel=1e-5) and model.training
    pairs = [(list(prompt.encode()), list(text.encode())) for prompt, text in zip(TEXTS, TEXTS[::-1], strict=True)]
    unbatched = completion_perplexity(model, tokenizer, pairs, batch_size=1)
    assert completion_perplexity(model, tokenizer, pairs[::-1]) == pytest.approx(unbatched, rel=1e-5)
    pairs = [pair for pair in pairs if pair[0]]
    prompts, answers = zip(*pairs, strict=True)
    log_probs, mask = completion_log_probs(model.eval(), prompts, answers)  # pads prompts on the left
    loss = completion_perplexity(model, tokenizer, pairs)["loss"]
    assert -float(log_probs[mask].mean()) == pytest.approx(loss, rel=1e-5)


def test_completion_perplexity_conditions_on_the_prompt(tokenizer: Any) -> None:
    """Histories are 3, 4, and 1 after a start token; EOS counts as a token but not as a byte; then windows of 4."""
    result = completion_perplexity(COUNTING, tokenizer, [([1, 2, 3], [97, 256]), ([], [98]), ([5, 6], [])])
    assert (result["tokens"], result["bytes"]) == (3, 2) and history_of(result) == 3 + 4 + 1
    long = completion_perplexity(COUNTING, tokenizer, [(range(1, 7), [97, 98, 99])], max_length=4)
    assert history_of(long) == 2 + 3 + 3


def test_sequence_kl_of_a_representative_sample_is_exact() -> None:
    """Four answers of one token, 2:1:1 as the policy's (1/2, 1/4, 1/4): both estimates equal the exact KL."""
    policy, reference = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.7, 0.1])
    padding = torch.full((4, 1), torch.nan)
    rows = [
        torch.hstack([torch.tensor(np.log(distribution[[0, 0, 1, 2]]))[:, None], padding])
        for distribution in (policy, reference)
    ]
    exact = float((policy * np.log(policy / reference)).sum())
    estimates = sequence_kl(rows[0], rows[1], torch.tensor([[True, False]] * 4))
    assert estimates == pytest.approx({"kl": exact, "kl_per_token_k3": exact}, rel=1e-6)
    two_tokens = sequence_kl(rows[0][:, :1].view(2, 2), rows[1][:, :1].view(2, 2), torch.ones(2, 2))
    assert two_tokens == pytest.approx({"kl": 2 * exact, "kl_per_token_k3": exact}, rel=1e-6), (
        "with two tokens an answer"
    )


def test_compare_counts_each_prompt_once() -> None:
    """By the mean reward two prompts are won, one is a tie and one is lost; only one side has gold scores."""
    first, second = (
        Evaluation({}, [{"index": prompt, "reward": value} for prompt, row in enumerate(rewards) for value in row])
        for rewards in ([[9, 0, 0], [1, 2, 3], [0, 0, 0], [3, 0, 0]], [[1, 1, 1], [3, 2, 1], [1, 0, 0], [0, 0, 1]])
    )
    first.rows[0]["gold"] = 1.0
    interval = win_rate([1, 0, -1, 1], [0, 0, 0, 0])
    names = {"win_rate_reward": "win_rate", "win_rate_reward_low": "low", "win_rate_reward_high": "high"}
    assert first.by_prompt("reward") == [3, 2, 0, 1]
    assert compare(first, second) == {name: interval[key] for name, key in names.items()}


def test_evaluation_metrics_match_the_rows(
    tokenizer: Any, make_model: Callable[..., Any], make_reward_model: Any
) -> None:
    """Ten completions of two prompts, gold scores from a column: the interval is that of two values, not of twenty."""
    model, reference = (make_model(seed, initializer_range=0.2, resid_pdrop=0.5) for seed in (0, 1))
    options: dict[str, Any] = {"sampling": Sampling(3, stop_ids=tuple(range(99))), "completions_per_prompt": 10}
    options |= {"columns": {"level": [0.0, 1.0]}, "gold": load_reward(lambda level, **rest: level, tokenizer)}
    options |= {
        "reward_model": load_reward(make_reward_model(num_labels=2), tokenizer),
        "texts": TEXTS,
        "reference": reference,
    }
    result = evaluate_model(model, tokenizer, ["A?", "Longer?"], **options)
    metrics, columns = result.metrics, {name: [row[name] for row in result.rows] for name in result.rows[0]}
    assert [metrics[f"gold_score{end}"] for end in ("", "_low", "_high")] == [0.5, 0.0, 1.0]
    assert columns["gold"] == [0.0] * 10 + [1.0] * 10
    for name, key in (("reward_score", "reward"), ("kl", "kl"), ("length", "tokens"), ("eos_share", "stopped")):
        assert metrics[name] == pytest.approx(np.mean(columns[key]), rel=1e-5)
    reference.train()
    again = evaluate_model(model.train(), tokenizer, ["A?", "Longer?"], batch_size=3, **options)
    assert again.metrics == pytest.approx(metrics, rel=1e-4) and model.training and reference.training
    expected = [name for name in METRICS if not name.startswith("win_rate")]
    assert metrics.keys() == {*expected, "gold_score_low", "gold_score_high"}


class NoStartToken(SimpleNamespace):
    """A tokenizer of one letter, without special tokens."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text)}


NO_START_TOKEN = NoStartToken()
REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (distinct_n, ([],), {}, "at least one text"),
    (win_rate, ([1.0], [1.0, 2.0]), {}, "same prompts"),
    (mean_with_interval, ([1.0, math.nan],), {}, "1 of 2 values are not finite"),
    (mean_with_interval, ([1.0],), {"confidence": 1.0}, "between 0 and 1"),
    (preference_metrics, ([1.0], [math.inf], [1], [1]), {}, "not finite"),
    (preference_metrics, ([1.0], [0.0], [1], [1, 2]), {}, "differ in number"),
    (classification_metrics, ([1], [1, 0]), {}, "1 predictions against 2 labels"),
    (perplexity, (COUNTING, NO_START_TOKEN, ["a"]), {}, "neither BOS nor EOS"),
    (perplexity, (COUNTING, NO_START_TOKEN, ["a"]), {"max_length": 65}, "set it to 64 or less"),
]


@pytest.mark.parametrize(("measure", "arguments", "options", "message"), REFUSED)
def test_invalid_input_is_refused(measure: Any, arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(*arguments, **options)
