"""What is measured: classification, language modelling, generated text, reward models, comparisons of models, divergence.

Importing this package loads numpy only. torch arrives with the first call that needs it, and `evaluate` (seconds) with
the first touch of a classification metric.
"""

from typing import TYPE_CHECKING

from rlhf_recipes.core.lazy import lazy_names
from rlhf_recipes.evaluation.language_model import completion_perplexity, perplexity
from rlhf_recipes.evaluation.models import METRICS, Evaluation, compare, evaluate_model
from rlhf_recipes.evaluation.preference import calibration_table, preference_metrics

if TYPE_CHECKING:
    from rlhf_recipes.evaluation.classification import (
        F1,
        Accuracy,
        Precision,
        Recall,
        classification_metrics,
        compute_classification_metrics,
    )

__getattr__ = lazy_names(
    __name__,
    {
        "classification": [
            "Accuracy",
            "F1",
            "Precision",
            "Recall",
            "classification_metrics",
            "compute_classification_metrics",
        ],
    },
)

__all__ = [
    "F1",
    "METRICS",
    "Accuracy",
    "Evaluation",
    "Precision",
    "Recall",
    "calibration_table",
    "classification_metrics",
    "compare",
    "completion_perplexity",
    "compute_classification_metrics",
    "evaluate_model",
    "perplexity",
    "preference_metrics",
]
