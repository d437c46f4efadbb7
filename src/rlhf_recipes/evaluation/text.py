"""Metrics of generated text that need no model."""

import re
from collections.abc import Sequence

import numpy as np

from rlhf_recipes.core.errors import UserError

# Characters of scripts without spaces between words, with the marks that combine with them.
UNSPACED = re.compile(
    "["
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # hiragana, katakana
    "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\u3001\u3002\u300c-\u300f\uff01\uff0c\uff1a\uff1b\uff1f"  # their punctuation
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6"  # Thai, Lao
    "\u1000-\u102a\u1780-\u17b3"  # Burmese, Khmer
    "][\u3099\u309a\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b4-\u17d3]*"
)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Compute the share of different n-grams among all n-grams of the texts, in [0, 1].

    Words are split at whitespace, and each character of a script without spaces (Chinese, Japanese, Thai ...) is one
    word. No n-gram spans two texts. Without any n-gram the result is 0. The share falls as
    the number of texts grows, so compare sets of equal size only. After Li et al. 2016, arXiv:1510.03055.

    Raises:
        UserError: no texts, or n below 1.
    """
    if not texts:
        raise UserError("distinct-n of no texts; give at least one text")
    if n < 1:
        raise UserError(f"n of distinct-n is {n}; give at least 1")
    words = [split_words(text) for text in texts]
    ngrams = [tuple(row[start : start + n]) for row in words for start in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def split_words(text: str) -> list[str]:
    """Split a text at whitespace and around each character of a script that writes no spaces between words."""
    return UNSPACED.sub(r" \g<0> ", text).split()


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
