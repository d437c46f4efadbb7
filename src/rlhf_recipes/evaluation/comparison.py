"""Win rates between two models, and means, each with a confidence interval."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from rlhf_recipes.core.errors import UserError


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float], *, confidence: float = 0.95) -> dict[str, float]:
    """Compute how often A's answer scores above B's answer to the same prompt.

    Both sequences are (prompts,). Returns `win_rate`, where a tie counts as half a win, with `low` and `high`, and the
    counts `wins`, `ties` and `losses`. The interval is Wilson's score interval (Wilson 1927). It keeps its coverage at
    shares near 0 and 1, where a bootstrap of a few dozen prompts shrinks to a point. Ties make a share less variable
    than the binomial that Wilson assumes, so with ties the interval is rather too wide.

    Raises:
        UserError: unequal lengths, no scores, or scores that are not finite.
    """
    a, b = _finite(scores_a, "scores"), _finite(scores_b, "scores")
    if a.shape != b.shape:
        raise UserError(f"{a.size} scores against {b.size}; compare two models on the same prompts")
    wins, ties, losses = int((a > b).sum()), int((a == b).sum()), int((a < b).sum())
    share = (wins + ties / 2) / a.size
    low, high = _wilson_interval(share, a.size, confidence)
    return {"win_rate": share, "low": low, "high": high, "wins": wins, "ties": ties, "losses": losses}


def mean_with_interval(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0, resamples: int = 2000
) -> dict[str, float]:
    """Compute the `mean` of values with `low` and `high` of a percentile bootstrap (Efron 1979), and their `count`.

    The interval stays inside the range of the values. With fewer than about twenty values it is too narrow; a single
    value has an interval of width 0. `seed` fixes the resamples.

    Raises:
        UserError: no values, values that are not finite, or a `confidence` outside (0, 1).
    """
    array = _finite(values, "values")
    _check_confidence(confidence)
    generator = np.random.default_rng(seed)
    # One resample at a time: a table (resamples, values) of a large evaluation would take gigabytes.
    means = [array[generator.integers(0, array.size, array.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high), "count": array.size}


def _wilson_interval(share: float, count: int, confidence: float) -> tuple[float, float]:
    _check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half_width = z / scale * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}, but must lie between 0 and 1; 0.95 is customary")


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    """Return the values as float64, (values,), checked to be finite and not empty."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise UserError(f"no {name} to average; give at least one")
    if not np.isfinite(array).all():
        raise UserError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} {name} are not finite; drop or repair them"
        )
    return array
