"""Measures of generated text that need no model."""

from collections.abc import Sequence

import numpy as np

from rlhf_recipes.core.errors import UserError


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of different n-grams among all n-grams of the whole set, in [0, 1] (after Li et al. 2016, arXiv:1510.03055).

    Words are split at whitespace and no n-gram crosses from one text to the next. Texts too short to hold an n-gram
    leave nothing to count; if none holds one the result is 0. The measure falls as a set grows, so compare sets of
    about equal size only.
    """
    if not texts:
        raise UserError("distinct-n of no texts; give at least one text")
    if n < 1:
        raise UserError(f"distinct-n needs n of at least 1, got {n}")
    words = [text.split() for text in texts]
    ngrams = [tuple(row[start : start + n]) for row in words for start in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def length_statistics(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, median and 90th percentile, in the unit that came in."""
    if len(lengths) == 0:
        raise UserError("length statistics of no texts; give at least one length")
    median, p90 = np.percentile(lengths, [50, 90])
    return {"mean": float(np.mean(lengths)), "median": float(median), "p90": float(p90)}


def eos_share(flags: Sequence[bool]) -> float:
    """Share of generations that stopped by themselves; `flags` holds one truth value per generation."""
    if len(flags) == 0:
        raise UserError("EOS share of no generations; give at least one flag")
    return float(np.mean(np.asarray(flags, dtype=bool)))
