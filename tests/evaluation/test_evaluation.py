"""What is measured, against examples worked by hand, float64 NumPy, and what must not matter: padding, batches, order."""

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
from rlhf_recipes.evaluation.text import distinct_n, eos_share, length_statistics
from rlhf_recipes.generation.sampling import Sampling
from rlhf_recipes.scoring.reward import load_reward

VOCABULARY = 262
TEXTS = ["the mill stands by the river, where it always stood", "", "é", "nobody <|user|> was seen", "a"]


def test_distinct_n_counts_over_the_whole_set_and_never_across_texts() -> None:
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


def test_wins_ties_and_losses_by_hand() -> None:
    result = win_rate([2.0, 1.0, -1.0, 0.0], [1.0, 1.0, -3.0, 5.0])
    assert (result["win_rate"], result["wins"], result["ties"], result["losses"]) == (0.625, 2, 1, 1)
    swapped = win_rate([1.0, 1.0, -3.0, 5.0], [2.0, 1.0, -1.0, 0.0])
    assert swapped["win_rate"] == 0.375 and (swapped["wins"], swapped["losses"]) == (1, 2)
    assert (swapped["low"], swapped["high"]) == pytest.approx((1 - result["high"], 1 - result["low"]))
    textbook = win_rate([1.0] * 8 + [0.0] * 2, [0.5] * 10)
    assert (textbook["low"], textbook["high"]) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@pytest.mark.parametrize(("confidence", "z"), [(0.5, 0.6744898), (0.9, 1.6448536), (0.99, 2.5758293)])
@pytest.mark.parametrize(("wins", "count"), [(0, 1), (1, 1), (3, 7), (40, 40), (199, 400)])
def test_each_end_is_where_a_score_test_just_fails(wins: int, count: int, confidence: float, z: float) -> None:
    """Wilson's ends p solve (share - p)^2 = z^2 p (1 - p) / count, one on each side of the share."""
    result = win_rate([1.0] * wins + [0.0] * (count - wins), [0.5] * count, confidence=confidence)
    share = wins / count
    assert 0 <= result["low"] <= share <= result["high"] <= 1 and result["low"] < result["high"]
    for end in (result["low"], result["high"]):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, rel=1e-6, abs=1e-12)


def test_the_bootstrap_of_two_values_by_hand() -> None:
    """Resamples of (0, 1) have the mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    assert mean_with_interval([0, 1], confidence=0.4) == {"mean": 0.5, "low": 0.5, "high": 0.5, "count": 2}
    assert mean_with_interval([1, 0], confidence=0.6) == {"mean": 0.5, "low": 0.0, "high": 1.0, "count": 2}
    assert mean_with_interval([3.5]) == {"mean": 3.5, "low": 3.5, "high": 3.5, "count": 1}


def test_the_bootstrap_of_many_values_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(5, 2, size=400)
    first, again, other = (
        mean_with_interval(values.tolist(), confidence=0.9, resamples=4000, seed=seed) for seed in (0, 0, 1)
    )
    half_width = 1.6448536 * values.std() / 20
    assert first["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert first["high"] - values.mean() == pytest.approx(half_width, rel=0.05)
    assert values.mean() - first["low"] == pytest.approx(half_width, rel=0.05)
    assert first == again and first["low"] != other["low"]


def test_pairs_by_hand() -> None:
    """Probabilities of the chosen answer: 2/3, 1/3 and a tie. Confidences: 2/3 twice, right once; 1/2 once."""
    chosen, rejected = [math.log(2), 1.0, 7.0], [0.0, 1.0 + math.log(2), 7.0]
    found = preference_metrics(chosen, rejected, [3, 5, 6], [2, 5, 4])
    by_hand = {"accuracy": 0.5, "margin": 0, "longer_accuracy": 5 / 6, "calibration_error": 1 / 9, "brier": 29 / 108}
    assert found == pytest.approx(by_hand, abs=1e-12)
    undecided, leaning = calibration_table(chosen, rejected)
    assert undecided == pytest.approx({"low": 0.5, "high": 0.55, "confidence": 0.5, "accuracy": 0.5, "count": 1})
    assert leaning == pytest.approx({"low": 0.65, "high": 0.7, "confidence": 2 / 3, "accuracy": 0.5, "count": 2})


@pytest.mark.parametrize("bins", [1, 4, 10, 33])
def test_calibration_is_that_of_each_pair_shown_in_both_orders(bins: int) -> None:
    """Both orders, labels 1 and 0, twice as many bins of [0, 1]: the plain calibration error of a classifier."""
    chance = np.random.default_rng(0)
    chosen, rejected = chance.normal(0.4, 2, 500), chance.normal(0, 2, 500)
    found = preference_metrics(chosen.tolist(), rejected.tolist(), [1] * 500, [1] * 500, bins)
    probability = 1 / (1 + np.exp(np.concatenate([rejected - chosen, chosen - rejected])))
    label = np.repeat([1.0, 0.0], 500)
    place = np.digitize(probability, np.linspace(0, 1, 2 * bins + 1)[1:-1])
    gaps = [abs((probability - label)[place == one].sum()) for one in range(2 * bins)]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 1000, abs=1e-12)
    assert found["brier"] == pytest.approx(brier_score_loss(label, probability))
    assert found["accuracy"] == (probability[:500] > 0.5).mean()
    table = calibration_table(chosen.tolist(), rejected.tolist(), bins)
    inside = sum(row["count"] for row in table if row["low"] <= row["confidence"] <= row["high"])
    assert inside == 500, "every pair stands in the bin of its confidence"


def test_a_reward_model_that_is_sure_of_everything() -> None:
    right = preference_metrics([1e4, 9e3], [0.0, -1e4], [1, 1], [1, 1])
    assert right == {"accuracy": 1, "margin": 14500, "longer_accuracy": 0.5, "calibration_error": 0, "brier": 0}
    wrong = preference_metrics([0.0], [1e4], [1], [2])
    assert wrong == {"accuracy": 0, "margin": -1e4, "longer_accuracy": 0, "calibration_error": 1, "brier": 1}
    assert [(row["low"], row["high"]) for row in calibration_table([1e4, 2e4], [0, 0])] == [(0.95, 1)]


def counted(predicted: Sequence[int], expected: Sequence[int], average: str) -> Any:
    """Accuracy, and precision, recall and F1 averaged as asked, from counts of hits, claims and carriers."""
    pairs = list(zip(predicted, expected, strict=True))
    scores: list[tuple[float, float, float]] = []
    labels = [1] if average == "binary" else sorted({*predicted, *expected})
    for label in labels:
        hits = pairs.count((label, label))
        claims, carriers = list(predicted).count(label), list(expected).count(label)
        f1 = 2 * hits / (claims + carriers) if claims + carriers else 0.0
        scores.append((hits / claims if claims else 0.0, hits / carriers if carriers else 0.0, f1))
    weights = [list(expected).count(label) for label in labels] if average == "weighted" else [1] * len(labels)
    precision, recall, f1 = np.average(scores, axis=0, weights=weights)
    share = sum(one == other for one, other in pairs) / len(pairs)
    return pytest.approx({"accuracy": share, "precision": precision, "recall": recall, "f1": f1})


@pytest.mark.parametrize("average", ["binary", "macro", "weighted"])
@pytest.mark.parametrize(
    ("predicted", "expected"), [("1100101", "1001100"), ("0", "1"), ("1111", "1000"), ("00", "00")]
)
def test_labels_are_scored_as_counted_by_hand(predicted: str, expected: str, average: str) -> None:
    """A constant label, one row, and a label that nobody gives are among them."""
    given, right = [int(one) for one in predicted], [int(one) for one in expected]
    assert classification_metrics(given, right, average) == counted(given, right, average)
    assert classification_metrics(given, right) == counted(given, right, "binary")


def test_several_labels_are_averaged_with_equal_weight() -> None:
    predicted, expected = [0, 2, 2, 1, 0, 0, 5], [0, 2, 1, 1, 0, 2, 0]
    assert classification_metrics(predicted, expected) == counted(predicted, expected, "macro")
    assert classification_metrics([0, 2], [0, 1]) == counted([0, 2], [0, 1], "macro")
    micro = classification_metrics(predicted[::-1], expected[::-1], "micro")
    assert list(micro.values()) == pytest.approx([4 / 7] * 4), "where each row has one label, all are the accuracy"


def test_logits_become_labels() -> None:
    """Two logits and one logit of the same reward model score alike; the number of logits decides between averages."""
    two = np.array([[0.2, 1.0], [3.0, -1.0], [-2.0, -3.0], [0.0, 0.5]])
    given, right = [1, 0, 0, 1], [1, 0, 1, 1]
    measure: Callable[..., Any] = compute_classification_metrics
    for logits in (two, two[:, 1] - two[:, 0], two[:, 1:] - two[:, :1], (two, "hidden states")):
        for labels in (np.array(right), np.array(right)[:, None]):
            assert measure(EvalPrediction(logits, labels)) == counted(given, right, "binary")
    three = np.hstack([two, np.full((4, 1), -9.0)])
    assert measure(EvalPrediction(three, np.array(right))) == counted(given, right, "macro")


class CountingModel(torch.nn.Module):
    """A letter predicted from a history of h tokens costs h + log(262) nats, whatever it is; id 0 takes the rest."""

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
    """The sum of h over all predicted tokens."""
    return pytest.approx((result["loss"] - math.log(VOCABULARY)) * result["tokens"], rel=1e-4)


def test_the_mean_is_over_tokens_not_texts(tokenizer: Any) -> None:
    """Texts of 3, 0 and 1 tokens, each behind a start token: 1 + 2 + 3, and 1."""
    result = perplexity(COUNTING, tokenizer, ["abc", "", "<|user|>"])
    nats = 7 + 4 * math.log(VOCABULARY)
    assert (result["tokens"], result["bytes"]) == (4, 3 + 8)
    assert result["loss"] == pytest.approx(nats / 4, rel=1e-6)
    assert result["perplexity"] == pytest.approx(VOCABULARY * math.exp(7 / 4), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 11, rel=1e-6)
    assert perplexity(COUNTING, tokenizer, ["é"])["bytes"] == 2
    endless: Any = CountingModel(context=None)
    assert perplexity(endless, tokenizer, ["a" * 1500], max_length=1501)["perplexity"] == math.inf


def test_windows_of_a_long_text_by_hand(tokenizer: Any, make_model: Callable[..., Any]) -> None:
    """(begin, end, first scored) of 11 ids in a context of 4, read one by one in float64; and the history they leave."""
    model, ids, nats = make_model(0, initializer_range=0.2), torch.tensor([256, *b"abcdefghij"]), 0.0
    for begin, end, first in [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8), (7, 11, 10)]:
        log_probs = model(ids[None, begin:end]).logits[0].detach().double().log_softmax(dim=-1)
        nats -= sum(float(log_probs[place - 1 - begin, ids[place]]) for place in range(first, end))
    result = perplexity(model, tokenizer, ["abcdefghij"], max_length=4)
    assert result["perplexity"] == pytest.approx(math.exp(nats / 10), rel=1e-5)
    for length, history in ((None, 55), (4, 1 + 2 + 3 + 3 * (2 + 3) + 3), (2, 10)):
        result = perplexity(COUNTING, tokenizer, ["abcdefghij"], max_length=length)
        assert result["tokens"] == 10 and history_of(result) == history


def test_padding_batches_order_and_dropout_change_nothing(tokenizer: Any, make_model: Callable[..., Any]) -> None:
    model = make_model(0, initializer_range=0.2, resid_pdrop=0.5)
    for length in (None, 9):
        alone = perplexity(model, tokenizer, TEXTS, batch_size=1, max_length=length)
        for texts, size in ((TEXTS, 2), (TEXTS[::-1], 3), (TEXTS, 64)):
            together = perplexity(model.train(), tokenizer, texts, batch_size=size, max_length=length)
            assert together == pytest.approx(alone, rel=1e-5) and model.training
    pairs = [(list(prompt.encode()), list(text.encode())) for prompt, text in zip(TEXTS, TEXTS[::-1], strict=True)]
    alone = completion_perplexity(model, tokenizer, pairs, batch_size=1)
    assert completion_perplexity(model, tokenizer, pairs[::-1]) == pytest.approx(alone, rel=1e-5)
    pairs = [pair for pair in pairs if pair[0]]
    prompts, answers = zip(*pairs, strict=True)
    log_probs, mask = completion_log_probs(model.eval(), prompts, answers)  # prompts are padded on the left here
    loss = completion_perplexity(model, tokenizer, pairs)["loss"]
    assert -float(log_probs[mask].mean()) == pytest.approx(loss, rel=1e-5)


def test_completions_are_scored_behind_their_prompts(tokenizer: Any) -> None:
    """Histories 3, 4; then 1 behind a start token; EOS counts as a token and not as a byte; windows of 4 at the end."""
    result = completion_perplexity(COUNTING, tokenizer, [([1, 2, 3], [97, 256]), ([], [98]), ([5, 6], [])])
    assert (result["tokens"], result["bytes"]) == (3, 2) and history_of(result) == 3 + 4 + 1
    long = completion_perplexity(COUNTING, tokenizer, [(range(1, 7), [97, 98, 99])], max_length=4)
    assert history_of(long) == 2 + 3 + 3


def test_kl_of_a_sample_in_the_policys_own_proportions() -> None:
    """Four one-token answers drawn as 2:1:1 by a policy (1/2, 1/4, 1/4): both estimates are the KL itself."""
    policy, reference = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.7, 0.1])
    padding = torch.full((4, 1), torch.nan)
    rows = [torch.hstack([torch.tensor(np.log(side[[0, 0, 1, 2]]))[:, None], padding]) for side in (policy, reference)]
    exact = float((policy * np.log(policy / reference)).sum())
    found = sequence_kl(rows[0], rows[1], torch.tensor([[True, False]] * 4))
    assert found == pytest.approx({"kl": exact, "kl_per_token_k3": exact}, rel=1e-6)
    folded = sequence_kl(rows[0][:, :1].view(2, 2), rows[1][:, :1].view(2, 2), torch.ones(2, 2))
    assert folded == pytest.approx({"kl": 2 * exact, "kl_per_token_k3": exact}, rel=1e-6), "two tokens an answer"


def test_a_prompt_counts_once_however_many_answers_it_has() -> None:
    """Two prompts are won by the mean (though by few answers), one is a tie, one is lost; one side alone has gold."""
    one, other = (
        Evaluation({}, [{"index": place, "reward": value} for place, row in enumerate(side) for value in row])
        for side in ([[9, 0, 0], [1, 2, 3], [0, 0, 0], [3, 0, 0]], [[1, 1, 1], [3, 2, 1], [1, 0, 0], [0, 0, 1]])
    )
    one.rows[0]["gold"] = 1.0
    interval = win_rate([1, 0, -1, 1], [0, 0, 0, 0])
    names = {"win_rate_reward": "win_rate", "win_rate_reward_low": "low", "win_rate_reward_high": "high"}
    assert one.by_prompt("reward") == [3, 2, 0, 1]
    assert compare(one, other) == {name: interval[key] for name, key in names.items()}


def test_an_evaluation_follows_its_rows(
    tokenizer: Any, make_model: Callable[..., Any], make_reward_model: Any
) -> None:
    """Ten answers to each of two prompts, whose gold is a column: the interval is that of two values, not of twenty."""
    model, other = (make_model(seed, initializer_range=0.2, resid_pdrop=0.5) for seed in (0, 1))
    asked: dict[str, Any] = {"sampling": Sampling(3, stop_ids=tuple(range(99))), "completions_per_prompt": 10}
    asked |= {"columns": {"level": [0.0, 1.0]}, "gold": load_reward(lambda level, **rest: level, tokenizer)}
    asked |= {
        "reward_model": load_reward(make_reward_model(num_labels=2), tokenizer),
        "texts": TEXTS,
        "reference": other,
    }
    result = evaluate_model(model, tokenizer, ["A?", "Longer?"], **asked)
    found, columns = result.metrics, {name: [row[name] for row in result.rows] for name in result.rows[0]}
    assert [found[f"gold_score{end}"] for end in ("", "_low", "_high")] == [0.5, 0.0, 1.0]
    assert columns["gold"] == [0.0] * 10 + [1.0] * 10
    for name, key in (("reward_score", "reward"), ("kl", "kl"), ("length", "tokens"), ("eos_share", "stopped")):
        assert found[name] == pytest.approx(np.mean(columns[key]), rel=1e-5)
    other.train()
    again = evaluate_model(model.train(), tokenizer, ["A?", "Longer?"], batch_size=3, **asked)
    assert again.metrics == pytest.approx(found, rel=1e-4) and model.training and other.training
    told = [name for name in METRICS if not name.startswith("win_rate")]
    assert found.keys() == {*told, "gold_score_low", "gold_score_high"}


MUTE = SimpleNamespace(bos_token_id=None, eos_token_id=None)
REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (distinct_n, ([],), {}, "at least one text"),
    (win_rate, ([1.0], [1.0, 2.0]), {}, "same prompts"),
    (mean_with_interval, ([1.0, math.nan],), {}, "1 of 2 values are not finite"),
    (mean_with_interval, ([1.0],), {"confidence": 1.0}, "between 0 and 1"),
    (preference_metrics, ([1.0], [math.inf], [1], [1]), {}, "not finite"),
    (preference_metrics, ([1.0], [0.0], [1], [1, 2]), {}, "differ in number"),
    (classification_metrics, ([1], [1, 0]), {}, "1 predictions against 2 labels"),
    (perplexity, (COUNTING, MUTE, ["a"]), {}, "neither BOS nor EOS"),
    (perplexity, (COUNTING, MUTE, ["a"]), {"max_length": 65}, "set it to 64 or less"),
]


@pytest.mark.parametrize(("measure", "given", "options", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(measure: Any, given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(*given, **options)
