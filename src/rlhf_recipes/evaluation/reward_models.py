"""Quality of a reward model on held-out rows, measured with the scores that PPO would get from it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import EvalPrediction

from rlhf_recipes.data import prompt_and_completion_ids
from rlhf_recipes.evaluation.classification import compute_classification_metrics
from rlhf_recipes.evaluation.preference import calibration_table, preference_metrics
from rlhf_recipes.scoring import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Measurement = tuple[dict[str, float], list[dict[str, float]]]  # metrics, rows of the reliability plot


def measure_classifier(
    reward: Reward, texts: Sequence[str], ids: Sequence[Sequence[int]], labels: Sequence[int]
) -> Measurement:
    """Measure a classifier on texts with labels 0 (bad) and 1 (good).

    ids: the tokens of each text.

    Returns:
        Metrics, and the rows of the reliability plot (see `calibration_table`).
    """
    scores = reward([""] * len(ids), texts, prompt_ids=[[]] * len(ids), completion_ids=ids)
    truth = np.array(labels)
    metrics = compute_classification_metrics(EvalPrediction(np.array(scores), truth))
    # The right and the wrong label are a pair, too: its margin is the log-odds of the right label.
    margins, zeros = np.where(truth == 1, scores, np.negative(scores)).tolist(), [0] * len(ids)
    paired = preference_metrics(margins, zeros, zeros, zeros)
    shared = {key: paired[key] for key in ("margin", "calibration_error", "brier")}
    metrics |= {"reward_accuracy": metrics["accuracy"]} | shared | _score_statistics(scores)
    return metrics, calibration_table(margins, zeros)


def measure_ranking(
    reward: Reward,
    pairs: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
) -> Measurement:
    """Measure a reward model on pairs of a `chosen` and a `rejected` answer, with an optional `prompt`.

    max_length: drop a pair if one of its answers, with the prompt, has more tokens; None: keep all.

    Returns:
        Metrics, and the rows of the reliability plot (see `calibration_table`).
    """
    sides = ("chosen", "rejected")

    def fits(pair: list[tuple[list[int], list[int]]]) -> bool:
        return max_length is None or all(len(prompt) + len(answer) <= max_length for prompt, answer in pair)

    tokenized = [
        (row, [prompt_and_completion_ids(row.get("prompt", ""), row[side], tokenizer) for side in sides])
        for row in pairs
    ]
    tokenized = [(row, pair) for row, pair in tokenized if fits(pair)]
    scores: list[list[float]] = []
    lengths: list[list[int]] = []
    for index, side in enumerate(sides):
        prompts, answers = [row.get("prompt", "") for row, _ in tokenized], [row[side] for row, _ in tokenized]
        prompt_ids = [pair[index][0] for _, pair in tokenized]
        completion_ids = [pair[index][1] for _, pair in tokenized]
        scores.append(reward(prompts, answers, prompt_ids=prompt_ids, completion_ids=completion_ids))
        lengths.append([len(answer) for answer in completion_ids])
    measured = preference_metrics(scores[0], scores[1], lengths[0], lengths[1])
    metrics = {"reward_accuracy": measured.pop("accuracy"), **measured, "pairs": len(tokenized)}
    return metrics | _score_statistics([*scores[0], *scores[1]]), calibration_table(scores[0], scores[1])


def _score_statistics(scores: Sequence[float]) -> dict[str, float]:
    """Return the mean and standard deviation, which `ModelReward.normalize` reads from the model's config."""
    return {"score_mean": float(np.mean(scores)), "score_std": float(np.std(scores))}
