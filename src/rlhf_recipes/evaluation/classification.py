"""Accuracy, precision, recall and F1 as metrics of `evaluate` that work offline.

`evaluate.load("accuracy")` downloads a script from the Hub. These subclasses are part of the package and call
scikit-learn.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from transformers import EvalPrediction

from rlhf_recipes.core.errors import UserError

AVERAGES = ("auto", "binary", "macro", "micro", "weighted")


class _LabelMetric(evaluate.Metric):
    """A metric over two lists of integer labels."""

    description: ClassVar[str]

    def _info(self) -> evaluate.MetricInfo:
        labels = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.description, citation="", features=labels)


class Accuracy(_LabelMetric):
    """Share of correct labels."""

    description = "Share of predicted labels that equal the reference."

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        # `average` is accepted because `evaluate.combine` gives the same options to every metric.
        return {"accuracy": float(accuracy_score(references, predictions))}


class Precision(_LabelMetric):
    """Share of correct labels among the predicted ones."""

    description = "Share of examples predicted to have a label that have it; 0 if the label was never predicted."

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        return {"precision": float(precision_score(references, predictions, average=average, zero_division=0))}


class Recall(_LabelMetric):
    """Share of the true labels that were predicted."""

    description = "Share of examples with a label for which it was predicted; 0 if no example has it."

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        return {"recall": float(recall_score(references, predictions, average=average, zero_division=0))}


class F1(_LabelMetric):
    """Harmonic mean of precision and recall."""

    description = "Harmonic mean of precision and recall."

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}


def classification_metrics(
    predictions: Sequence[int] | np.ndarray, references: Sequence[int] | np.ndarray, average: str = "auto"
) -> dict[str, float]:
    """Compute accuracy, precision, recall and F1 of integer labels, each in [0, 1].

    Args:
        predictions, references: labels, (examples,).
        average: how precision, recall and F1 of the labels become one number: `binary` (label 1 alone), `macro` (plain
            mean over labels), `micro`, `weighted`, or `auto`: `binary` if the only labels are 0 and 1, else `macro`.

    Raises:
        UserError: no labels, unequal lengths, or an unknown `average`.
    """
    predicted, expected = np.asarray(predictions), np.asarray(references)
    if predicted.size == 0 or predicted.shape != expected.shape:
        raise UserError(
            f"cannot score {predicted.size} predictions against {expected.size} labels; give one prediction per label"
        )
    if average not in AVERAGES:
        raise UserError(f"unknown average {average!r}; choose one of {', '.join(AVERAGES)}")
    if average == "auto":
        average = "binary" if np.isin(np.concatenate([predicted, expected]), (0, 1)).all() else "macro"
    # In memory: the default is a file in the user's cache, which parallel processes would share.
    metrics = evaluate.combine([metric(keep_in_memory=True) for metric in (Accuracy, Precision, Recall, F1)])
    return metrics.compute(predictions=predicted, references=expected, average=average)


def compute_classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the metrics of a classifier, as the `compute_metrics` of a Trainer; one logit predicts label 1 above 0.

    Logits are (examples, labels). Their number, not the labels that happen to occur, decides between `binary` and
    `macro`.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    logits = np.asarray(logits)
    if logits.ndim == 1:
        logits = logits[:, None]
    predicted = (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(axis=1)
    references = np.asarray(prediction.label_ids).reshape(-1).astype(np.int64)
    return classification_metrics(predicted, references, average="binary" if logits.shape[1] <= 2 else "macro")
