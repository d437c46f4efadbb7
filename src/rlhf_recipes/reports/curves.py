"""Training curves from a Trainer's log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.reports.canvas import (
    LABELS,
    colours,
    draw_series,
    finish_curves,
    grid_inches,
    grid_of_axes,
    label_of,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = tuple[str, Sequence[str]]

# Which logged keys share a panel; the first panel that claims a key has it. `*` stands for any text, and a key claimed
# by none gets a panel of its own.
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
# Counters and clocks: a Trainer logs them, nobody reads them as a curve.
BOOKKEEPING = (
    "step", "epoch", "eps", "episode", "total_flos", "train_loss", "*num_tokens", "num_input_tokens_seen",
    "*_runtime", "*_per_second", "time/*",
)  # fmt: skip


def plot_curves(
    log_history: Sequence[Mapping[str, Any]], path: str | Path, panels: Sequence[Panel] | None = None, title: str = ""
) -> Figure:
    """Curves of a Trainer's `state.log_history` against the optimizer step, written to `path` as PNG.

    `panels` is `[(title, [key, ...]), ...]`; without it every logged number is shown, related ones together. A long,
    noisy series is drawn faint under its trend (a centred Gaussian, so it does not lag).
    """
    series = _series(log_history)
    chosen = list(panels) if panels is not None else _automatic_panels(list(series))
    unknown = [key for _, keys in chosen for key in keys if key not in series]
    if unknown:
        raise UserError(
            f"nothing was logged as {', '.join(unknown)}; logged are {', '.join(sorted(series)) or 'none'}"
        )
    if not chosen:
        raise UserError("the log holds no curve to draw; train with a smaller logging_steps")

    def draw(figure: Figure) -> None:
        for axes, (name, keys) in zip(grid_of_axes(figure, len(chosen)), chosen, strict=True):
            axes.set_title(name)
            for colour, key in zip(colours(len(keys)), keys, strict=True):
                draw_series(axes, *series[key], key, colour)
            finish_curves(axes, "optimizer step", legend=len(keys) > 1 or keys[0] in LABELS)

    return write_figure(draw, path, title, grid_inches(len(chosen)))


def _series(log_history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{key: (steps, values)}` of all numbers logged with a step, in the order in which keys first appear."""
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if "step" in entry and isinstance(value, Real):
                points.setdefault(key, []).append((float(entry["step"]), float(value)))
    return {key: (np.array(rows)[:, 0], np.array(rows)[:, 1]) for key, rows in points.items()}


def _automatic_panels(keys: Sequence[str]) -> list[Panel]:
    left = [key for key in keys if not _matches(key, BOOKKEEPING)]
    panels: list[Panel] = []
    for title, patterns in KNOWN_PANELS:
        claimed = [key for key in left if _matches(key, patterns)]
        left = [key for key in left if key not in claimed]
        if claimed:
            panels.append((title, claimed))
    return panels + [(label_of(key).capitalize(), [key]) for key in left]


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
