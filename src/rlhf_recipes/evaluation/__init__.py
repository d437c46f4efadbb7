"""Measuring models: perplexity, classification, preferences, samples, comparisons, divergence, reward models.

The names that need the `evaluate` library (seconds to import) are imported when they are first used.
"""

from typing import TYPE_CHECKING

from rlhf_recipes.core.lazy import lazy_names
from rlhf_recipes.evaluation.inputs import EvalInputs, evenly_spaced, first_tokens, fit_inputs
from rlhf_recipes.evaluation.language_model import completion_perplexity, perplexity
from rlhf_recipes.evaluation.models import METRICS, Evaluation, compare, evaluate_model
from rlhf_recipes.evaluation.preference import calibration_table, preference_metrics
from rlhf_recipes.evaluation.tables import comparison_tables

if TYPE_CHECKING:
    from rlhf_recipes.evaluation.classification import (
        F1,
        Accuracy,
        Precision,
        Recall,
        classification_metrics,
        compute_classification_metrics,
    )
    from rlhf_recipes.evaluation.reward_models import measure_classifier, measure_ranking

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
        "reward_models": ["measure_classifier", "measure_ranking"],
    },
)

__all__ = [
    "F1",
    "METRICS",
    "Accuracy",
    "EvalInputs",
    "Evaluation",
    "Precision",
    "Recall",
    "calibration_table",
    "classification_metrics",
    "compare",
    "comparison_tables",
    "completion_perplexity",
    "compute_classification_metrics",
    "evaluate_model",
    "evenly_spaced",
    "first_tokens",
    "fit_inputs",
    "measure_classifier",
    "measure_ranking",
    "perplexity",
    "preference_metrics",
]
