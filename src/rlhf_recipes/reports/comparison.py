"""Figures that compare: confidence with truth, stage with stage, a good run with a bad one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.reports.canvas import (
    COLOURS,
    FAINT,
    SMOOTHED_FROM,
    colours,
    draw_series,
    finish_curves,
    grid_inches,
    grid_of_axes,
    label_of,
    short_number,
    smooth,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_reliability(
    table: Sequence[Mapping[str, float]], path: str | Path, title: str = "Is the reward model sure when it is right?"
) -> Figure:
    """Accuracy against confidence from the rows of `metrics.calibration_table`, with the pairs per bin underneath."""
    if not table:
        raise UserError("the calibration table is empty; score at least one pair")
    confidence, accuracy, count = (
        np.array([row[key] for row in table]) for key in ("confidence", "accuracy", "count")
    )

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        floor = min(0.5, float(accuracy.min()))
        upper.plot([0.5, 1], [0.5, 1], color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2, label="perfectly calibrated")
        upper.vlines(confidence, confidence, accuracy, color=COLOURS[1], alpha=0.45, linewidth=4, label="gap")
        upper.plot(confidence, accuracy, "o-", color=COLOURS[0], gid="accuracy", label="reward_model")
        upper.set(ylabel="share of pairs ordered rightly", xlim=(0.49, 1.01), ylim=(floor - 0.03, 1.03))
        upper.legend(loc="upper left")
        upper.grid()
        lower.bar(
            [row["low"] for row in table], count, [row["high"] - row["low"] for row in table],
            align="edge", color=COLOURS[0], edgecolor="white", linewidth=1.5,
        )  # fmt: skip
        lower.set(ylabel="pairs", xlabel="confidence of the reward model in the answer it prefers")
        lower.grid(axis="y")

    return write_figure(draw, path, title, (5.6, 5.6))


def plot_ladder(
    stages: Mapping[str, Mapping[str, float | None]], keys: Sequence[str], path: str | Path, title: str = ""
) -> Figure:
    """One panel per metric of `keys`, one bar per stage, from `{stage: {metric: value}}`; a missing value leaves a dash."""
    if not stages or not keys:
        raise UserError("a ladder needs at least one stage and one metric")
    for key in keys:
        if all(values.get(key) is None for values in stages.values()):
            raise UserError(
                f"no stage reports {key}; they report {', '.join(sorted({k for v in stages.values() for k in v}))}"
            )
    names = list(stages)

    def draw(figure: Figure) -> None:
        for axes, key in zip(grid_of_axes(figure, len(keys)), keys, strict=True):
            values = [stages[name].get(key) for name in names]
            heights = [0.0 if value is None else float(value) for value in values]
            bars = axes.bar(names, heights, width=0.66, color=colours(len(names)), gid=key)
            axes.bar_label(
                bars, ["–" if value is None else short_number(value) for value in values], padding=3, fontsize=9
            )
            axes.set_title(label_of(key))
            axes.margins(y=0.16)
            axes.axhline(0, color=FAINT, linewidth=0.8)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.set_yticks([])

    return write_figure(draw, path, title, grid_inches(len(keys), height=2.5))


def plot_overoptimization(
    good: Sequence[Mapping[str, float]],
    bad: Sequence[Mapping[str, float]],
    path: str | Path,
    *,
    x: str = "update",
    names: tuple[str, str] = ("tuned setting", "bad setting"),
    title: str = "A reward model can be pleased too much",
) -> Figure:
    """What the reward model gives and what gold gives, for a good and a bad run, after Gao et al. 2023 (arXiv:2210.10760).

    Each run is a list of rows with `reward_model`, `gold` and the key `x`, such as `update` or `kl`; rows are sorted by it.
    The best gold score of each run is marked.
    """
    runs = {name: sorted(rows, key=lambda row: row[x]) for name, rows in zip(names, (good, bad), strict=True)}
    if not all(runs.values()):
        raise UserError("over-optimisation needs at least one row of each run")

    def draw(figure: Figure) -> None:
        for axes, key, name in zip(
            figure.subplots(1, 2),
            ("reward_model", "gold"),
            ("Reward model's score: what PPO sees", "Gold score: the truth"),
            strict=True,
        ):
            axes.set_title(name)
            for (run, rows), colour in zip(runs.items(), COLOURS, strict=False):
                place, values = (np.array([float(row[column]) for row in rows]) for column in (x, key))
                draw_series(axes, place, values, f"{run}/{key}", colour, label=run)
                if key == "gold":
                    _mark_best(axes, place, values, colour)
            finish_curves(axes, label_of(x), legend=key == "reward_model")

    return write_figure(draw, path, title, (9.6, 3.9))


def _mark_best(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    trend = smooth(y) if len(y) >= SMOOTHED_FROM else y
    best = int(np.nanargmax(trend))
    axes.plot(x[best], trend[best], "o", color=colour, markersize=8, markeredgecolor="white", markeredgewidth=1.5)
    axes.annotate(
        f"best {short_number(trend[best])}", (x[best], trend[best]), (0, 9), textcoords="offset points",
        ha="center", fontsize=9, color=colour,
    )  # fmt: skip
