"""What is measured: classification, language modelling, generated text, judges, comparisons of models, divergence.

Importing this package loads numpy only. torch arrives with the first call that needs it, and `evaluate` (seconds) with
the first touch of a classification metric.
"""

from importlib import import_module
from typing import Any

from rlhf_recipes.metrics.comparison import mean_with_interval, win_rate
from rlhf_recipes.metrics.divergence import sequence_kl
from rlhf_recipes.metrics.language_model import completion_perplexity, perplexity
from rlhf_recipes.metrics.preference import calibration_table, preference_metrics
from rlhf_recipes.metrics.text import distinct_n, eos_share, length_statistics

_CLASSIFICATION = ("Accuracy", "F1", "Precision", "Recall", "classification_metrics", "compute_classification_metrics")

__all__ = [
    "calibration_table",
    "completion_perplexity",
    "distinct_n",
    "eos_share",
    "length_statistics",
    "mean_with_interval",
    "perplexity",
    "preference_metrics",
    "sequence_kl",
    "win_rate",
    *_CLASSIFICATION,
]


def __getattr__(name: str) -> Any:
    if name in _CLASSIFICATION:
        return getattr(import_module("rlhf_recipes.metrics.classification"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
