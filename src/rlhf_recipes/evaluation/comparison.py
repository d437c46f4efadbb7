"""One model against another, and means with the interval that the sample allows."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from rlhf_recipes.core.errors import UserError


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float], *, confidence: float = 0.95) -> dict[str, float]:
    """How often A's answer scores above B's answer to the same prompt; both sequences are `(prompts,)`.

    `win_rate` counts a tie as half a win. `low` and `high` are Wilson's score interval (Wilson 1927), which keeps its
    coverage at shares near 0 and 1, where a bootstrap of a few dozen prompts shrinks to a point. Ties make a share
    less variable than the binomial that Wilson assumes, so with ties the interval is on the wide side.
    """
    a, b = _finite(scores_a, "scores"), _finite(scores_b, "scores")
    if a.shape != b.shape:
        raise UserError(f"{a.size} scores against {b.size}; compare two models on the same prompts")
    wins, ties, losses = int((a > b).sum()), int((a == b).sum()), int((a < b).sum())
    share = (wins + ties / 2) / a.size
    low, high = _wilson(share, a.size, confidence)
    return {"win_rate": share, "low": low, "high": high, "wins": wins, "ties": ties, "losses": losses}


def mean_with_interval(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0, resamples: int = 2000
) -> dict[str, float]:
    """`mean` of `values` with `low` and `high` of a percentile bootstrap (Efron 1979), and `count`.

    The interval stays inside the range of the values; with fewer than about twenty it is too narrow, and a single value
    has an interval of width 0. `seed` fixes the resamples.
    """
    array = _finite(values, "values")
    _check_confidence(confidence)
    generator = np.random.default_rng(seed)
    # One resample at a time: the full (resamples, values) table would be gigabytes for a large evaluation.
    means = [array[generator.integers(0, array.size, array.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high), "count": array.size}


def _wilson(share: float, count: int, confidence: float) -> tuple[float, float]:
    _check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half_width = z / scale * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, got {confidence}; 0.95 is customary")


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise UserError(f"no {name} to average; give at least one")
    if not np.isfinite(array).all():
        raise UserError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} {name} are not finite; drop or repair them"
        )
    return array
