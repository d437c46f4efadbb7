"""Accuracy and calibration of a reward model's scores on pairs of answers.

Under Bradley-Terry the probability that the chosen answer is preferred is sigmoid(chosen score - rejected score).
"""

from collections.abc import Sequence

import numpy as np

from rlhf_recipes.core.errors import UserError


def preference_metrics(
    chosen_scores: Sequence[float],
    rejected_scores: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    bins: int = 10,
) -> dict[str, float]:
    """Measure a reward model on pairs; all four sequences are (pairs,), lengths in any one unit.

    Returns:
        `accuracy`: share of pairs where the chosen answer scores higher; a tie counts half.
        `margin`: mean of chosen score minus rejected score.
        `longer_accuracy`: accuracy of always picking the longer answer; equal lengths count half.
        `calibration_error`: expected calibration error, the mean over pairs of |confidence - accuracy| of their bin;
            see `calibration_table`.
        `brier`: mean squared gap between the probability of the chosen answer and 1; 0.25 for a constant score.

    Raises:
        UserError: no pairs, unequal lengths, or scores that are not finite.
    """
    margins = _margins(chosen_scores, rejected_scores)
    if not len(margins) == len(chosen_lengths) == len(rejected_lengths):
        raise UserError(
            f"scores of {len(margins)} pairs and lengths of {len(chosen_lengths)} chosen and {len(rejected_lengths)} "
            "rejected answers differ in number; give one of each per answer"
        )
    longer = np.asarray(chosen_lengths, dtype=np.float64) - np.asarray(rejected_lengths, dtype=np.float64)
    table = calibration_table(chosen_scores, rejected_scores, bins)
    gaps = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table)
    return {
        "accuracy": float(_wins(margins).mean()),
        "margin": float(margins.mean()),
        "longer_accuracy": float(_wins(longer).mean()),
        "calibration_error": float(gaps / len(margins)),
        "brier": float(np.square(1 - _sigmoid(margins)).mean()),
    }


def calibration_table(
    chosen_scores: Sequence[float], rejected_scores: Sequence[float], bins: int = 10
) -> list[dict[str, float]]:
    """Compute the rows of a reliability plot, one for each bin that holds pairs.

    The chosen answer always comes first, so P(chosen) would be compared with a label that is always 1. Instead the
    confidence max(p, 1 - p) is put into `bins` equal bins of [0.5, 1]. It is compared with whether the answer with the
    higher score is the chosen one (a tie counts half). The same results from showing each pair in both orders to twice
    as many bins of [0, 1]. Bins: Guo et al. 2017, arXiv:1706.04599.

    Returns:
        Rows of `low` and `high` (ends of the bin), mean `confidence`, `accuracy` and `count`.
    """
    if bins < 1:
        raise UserError(f"bins is {bins}; a calibration table needs at least 1")
    margins = _margins(chosen_scores, rejected_scores)
    confidence, correct = _sigmoid(np.abs(margins)), _wins(margins)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "low": 0.5 + number / (2 * bins),
            "high": 0.5 + (number + 1) / (2 * bins),
            "confidence": float(confidence[index == number].mean()),
            "accuracy": float(correct[index == number].mean()),
            "count": int((index == number).sum()),
        }
        for number in np.unique(index).tolist()
    ]


def _margins(chosen_scores: Sequence[float], rejected_scores: Sequence[float]) -> np.ndarray:
    """Return chosen minus rejected scores, (pairs,), float64."""
    chosen, rejected = np.asarray(chosen_scores, dtype=np.float64), np.asarray(rejected_scores, dtype=np.float64)
    if chosen.size == 0 or chosen.shape != rejected.shape or chosen.ndim != 1:
        raise UserError(
            f"cannot pair {chosen.size} chosen scores with {rejected.size} rejected ones; give one of each per pair"
        )
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        raise UserError("the reward model gave scores that are not finite; check its weights and precision")
    return chosen - rejected


def _wins(difference: np.ndarray) -> np.ndarray:
    """Return 1 where the difference is positive, 0 where it is negative, 0.5 for a tie."""
    return np.where(difference == 0, 0.5, difference > 0)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(values / 2))  # overflows for no margin
