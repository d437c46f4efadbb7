"""Training curves from a Trainer's log: which logged keys are drawn, and which share a panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.reports.chart import chart_from_log
from rlhf_recipes.reports.labels import label_of
from rlhf_recipes.reports.plots import plot_charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = tuple[str, Sequence[str]]  # title, logged keys

# The first panel with a matching pattern takes a key; a key that matches none gets a separate panel.
KNOWN_PANELS: tuple[Panel, ...] = (
    ("Loss (nats)", ("loss", "eval_loss", "eval_*_loss")),
    ("Perplexity", ("perplexity", "eval_perplexity")),
    ("Bits per byte", ("bits_per_byte", "eval_bits_per_byte")),
    ("Score", ("objective/scores", "eval_objective/scores", "objective/rlhf_reward")),
    ("KL to the reference (nats)", ("objective/kl", "eval_objective/kl")),
    ("Reward", ("rewards/chosen", "rewards/rejected", "eval_rewards/*", "*mean_reward", "*max_reward", "*min_reward")),
    ("Margin", ("margin", "eval_margin", "rewards/margins")),
    ("Accuracy (share)", ("*accuracy", "*accuracies")),
    ("Entropy (nats)", ("objective/entropy", "policy/entropy_avg", "entropy", "eval_entropy")),
    ("Policy loss", ("loss/policy_avg",)),
    ("Value loss", ("loss/value_avg",)),
    ("Change per update", ("policy/approxkl_avg", "policy/clipfrac_avg", "val/clipfrac_avg")),
    ("Learning rate", ("learning_rate", "lr")),
    ("Gradient norm", ("grad_norm",)),
)
# Counters and timings that a Trainer logs; nobody reads them as a curve.
NOT_DRAWN = (
    "step", "epoch", "eps", "episode", "total_flos", "train_loss", "*num_tokens", "num_input_tokens_seen",
    "*_runtime", "*_per_second", "time/*",
)  # fmt: skip


def plot_curves(
    log_history: Sequence[Mapping[str, Any]], path: str | Path, panels: Sequence[Panel] | None = None, title: str = ""
) -> Figure:
    """Draw a Trainer's `state.log_history` against the optimizer step and write it to `path` as PNG.

    panels: which logged keys share a panel; by default every logged number is drawn, related ones together.
    Raises UserError for a key that was never logged, or if the log holds nothing to draw.
    """
    logged = _logged_keys(log_history)
    panels = _default_panels(logged) if panels is None else panels
    unknown = [key for _, keys in panels for key in keys if key not in logged]
    if unknown:
        raise UserError(
            f"nothing was logged as {', '.join(unknown)}; logged are {', '.join(sorted(logged)) or 'none'}"
        )
    if not panels:
        raise UserError("the log holds no curve to draw; train with a smaller logging_steps")
    charts = [
        chart_from_log(name, log_history, {key: label_of(key) for key in keys}, x="optimizer step")
        for name, keys in panels
    ]
    return plot_charts(charts, path, title)


def _logged_keys(log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of all numbers logged with a step, in the order of their first appearance."""
    rows = [entry for entry in log_history if "step" in entry]
    return list(dict.fromkeys(key for entry in rows for key, value in entry.items() if isinstance(value, Real)))


def _default_panels(keys: Sequence[str]) -> list[Panel]:
    remaining = [key for key in keys if not _matches(key, NOT_DRAWN)]
    panels: list[Panel] = []
    for title, patterns in KNOWN_PANELS:
        matching = [key for key in remaining if _matches(key, patterns)]
        remaining = [key for key in remaining if key not in matching]
        if matching:
            panels.append((title, matching))
    labels = {key: label_of(key) for key in remaining}
    return panels + [(label[0].upper() + label[1:], [key]) for key, label in labels.items()]


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
