"""The metric that chooses the best model: an evaluation must log it, and it must tell models apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError

LESS_IS_BETTER = ("loss", "kl", "clipped_ratio")


def needs_metric(training: Any) -> bool:
    """Return whether an option reads a held-out metric: the best model, or a schedule that waits for a plateau."""
    schedule, strategy = (
        getattr(value, "value", value) for value in (training.lr_scheduler_type, training.save_strategy)
    )
    return training.load_best_model_at_end or strategy == "best" or schedule in ("reduce_lr_on_plateau", "greedy")


def choose_metric_(training: Any, metric: str) -> None:
    """Set `metric_for_best_model`, where it is needed and unset, and whether more of it is better; in place."""
    if training.metric_for_best_model is None and needs_metric(training):
        training.metric_for_best_model = metric
    if training.greater_is_better is None and training.metric_for_best_model is not None:
        training.greater_is_better = not training.metric_for_best_model.endswith(LESS_IS_BETTER)


def point_plateau_(training: Any) -> None:
    """Set the direction in which a plateau schedule expects its metric to go, in place; torch's default is downwards."""
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    options = dict(training.lr_scheduler_kwargs or {})
    if schedule in ("reduce_lr_on_plateau", "greedy") and training.greater_is_better and "mode" not in options:
        training.lr_scheduler_kwargs = options | {"mode": "max"}


def check_best_metric(training: Any, logged: Sequence[str], useless: Mapping[str, str] | None = None) -> None:
    """Check that the metric that chooses the best model is one that an evaluation logs.

    Args:
        logged: the names of this stage, without ``eval_``; one that ends in ``/`` stands for all that begin with it.
        useless: names that are logged and tell no models apart, each with the reason.

    Raises:
        UserError: another metric, or a useless one; or the best checkpoint is wanted without any evaluation.
    """
    if not needs_metric(training):
        return
    if getattr(training.eval_strategy, "value", training.eval_strategy) == "no":
        raise UserError("the best checkpoint is chosen by evaluations, and there are none; pass --eval_strategy steps")
    metric = str(training.metric_for_best_model)
    name = metric.removeprefix("eval_")
    useful = [each for each in logged if each not in (useless or {})]
    names = ", ".join(f"eval_{each}" for each in useful)
    if useless and name in useless:
        raise UserError(f"metric_for_best_model is {metric}, which {useless[name]}; choose one of {names}")
    known = name in useful or any(each.endswith("/") and name.startswith(each) for each in useful)
    if not known:
        raise UserError(
            f"metric_for_best_model is {metric}, which no evaluation of this stage logs; choose one of {names}"
        )
