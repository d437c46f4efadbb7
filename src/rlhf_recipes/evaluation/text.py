"""Metrics of generated text that need no model."""

from collections.abc import Sequence

import numpy as np

from rlhf_recipes.core.errors import UserError


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Compute the share of different n-grams among all n-grams of the texts, in [0, 1].

    Words are split at whitespace, and no n-gram spans two texts. Without any n-gram the result is 0. The share falls as
    the number of texts grows, so compare sets of equal size only. After Li et al. 2016, arXiv:1510.03055.

    Raises:
        UserError: no texts, or n below 1.
    """
    if not texts:
        raise UserError("distinct-n of no texts; give at least one text")
    if n < 1:
        raise UserError(f"n of distinct-n is {n}; give at least 1")
    words = [text.split() for text in texts]
    ngrams = [tuple(row[start : start + n]) for row in words for start in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def length_statistics(lengths: Sequence[int]) -> dict[str, float]:
    """Compute the `mean`, `median` and 90th percentile (`p90`), in the unit of `lengths`.

    Raises:
        UserError: no lengths.
    """
    if len(lengths) == 0:
        raise UserError("length statistics of no texts; give at least one length")
    median, p90 = np.percentile(lengths, [50, 90])
    return {"mean": float(np.mean(lengths)), "median": float(median), "p90": float(p90)}


def eos_share(flags: Sequence[bool]) -> float:
    """Compute the share of generations that a stop token ended; `flags` has one truth value for each generation.

    Raises:
        UserError: no flags.
    """
    if len(flags) == 0:
        raise UserError("EOS share of no generations; give at least one flag")
    return float(np.mean(np.asarray(flags, dtype=bool)))
