"""Quality of a reward model on held-out rows, measured with the scores that PPO would get from it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

from rlhf_recipes.evaluation.classification import compute_classification_metrics
from rlhf_recipes.evaluation.preference import calibration_table, preference_metrics
from rlhf_recipes.scoring import Reward

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
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


def measure_ranking(reward: Reward, pairs: Sequence[Mapping[str, Any]], texts: Decode) -> Measurement:
    """Measure a reward model on the rows that it is trained with: pairs of a chosen and a rejected answer, as ids.

    Args:
        pairs: `chosen_ids` and `rejected_ids`, each with the prompt, and `prompt_length`, the tokens of the prompt.
        texts: decodes rows of ids, for messages.

    Returns:
        Metrics, and the rows of the reliability plot (see `calibration_table`).
    """
    scores: list[list[float]] = []
    lengths: list[list[int]] = []
    for side in ("chosen_ids", "rejected_ids"):
        prompt_ids = [row[side][: row["prompt_length"]] for row in pairs]
        answer_ids = [row[side][row["prompt_length"] :] for row in pairs]
        scores.append(reward(texts(prompt_ids), texts(answer_ids), prompt_ids=prompt_ids, completion_ids=answer_ids))
        lengths.append([len(answer) for answer in answer_ids])
    measured = preference_metrics(scores[0], scores[1], lengths[0], lengths[1])
    metrics = {"reward_accuracy": measured.pop("accuracy"), **measured, "pairs": len(pairs)}
    return metrics | _score_statistics([*scores[0], *scores[1]]), calibration_table(scores[0], scores[1])


def _score_statistics(scores: Sequence[float]) -> dict[str, float]:
    """Return the mean and standard deviation, which `ModelReward.normalize` reads from the model's config."""
    return {"score_mean": float(np.mean(scores)), "score_std": float(np.std(scores))}
