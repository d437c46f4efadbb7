"""Figures that stages leave as PNG: charts, the calibration of a reward model, bars that compare models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.reports.chart import Chart, reliability_chart
from rlhf_recipes.reports.figure import add_panels, panel_inches, write_figure
from rlhf_recipes.reports.labels import label_of
from rlhf_recipes.reports.layout import Line, lay_out
from rlhf_recipes.reports.style import LIGHT, series_colours
from rlhf_recipes.reports.text import decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_charts(charts: Sequence[Chart], path: str | Path, title: str = "") -> Figure:
    """Write charts as one PNG, a panel each. Raises UserError if there is none."""
    if not charts:
        raise UserError("no chart to draw; give at least one")

    def draw(figure: Figure) -> None:
        for axes, chart in zip(add_panels(figure, len(charts)), charts, strict=True):
            draw_chart(axes, chart)

    return write_figure(draw, path, panel_inches(len(charts)), title=title)


def draw_chart(axes: Axes, chart: Chart) -> None:
    """Draw a chart. Lines can be found again by their gid: `<name>` for the values, `<name>/trend` for the trend."""
    layout = lay_out(chart)
    bottom, height = layout.y[0], layout.y[1] - layout.y[0]
    for number, (low, high, share) in enumerate(layout.bars):
        label = chart.bars_name if number == 0 else None
        axes.bar(
            low, share * height, high - low, bottom, align="edge",
            color=LIGHT["border"], edgecolor=LIGHT["paper"], linewidth=1.5, label=label,
        )  # fmt: skip
    for line in layout.lines:
        _draw_line(axes, line)
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x, loc="right")
    axes.set(xlim=layout.x, ylim=layout.y)
    for axis, axis_ticks in ((axes.xaxis, layout.x_ticks), (axes.yaxis, layout.y_ticks)):
        axis.set_ticks([value for value, _ in axis_ticks], [label for _, label in axis_ticks])
    axes.grid(axis="y")
    names = [line.series.name for line in layout.lines]
    if len(names) > 1 or (names and names[0].casefold() not in chart.title.casefold()):
        axes.legend(loc="best", handlelength=1.4).set_in_layout(False)  # a long name must not shrink the axes


def _draw_line(axes: Axes, line: Line) -> None:
    """Draw one line: the trend strong over the faint values, or the values with a dot at each of a few points."""
    name, colour = line.series.name, LIGHT[line.series.colour]
    if line.trend is not None:
        axes.plot(line.x, line.y, color=colour, gid=name, alpha=0.25, linewidth=1, clip_on=False)
        axes.plot(line.x, line.trend, color=colour, gid=f"{name}/trend", label=name, clip_on=False)
        return
    style = {"linestyle": (0, (1, 2.5)), "linewidth": 1.5} if line.series.dotted else {}
    style |= {"marker": "o", "markersize": 4} if line.has_dots else {}
    axes.plot(line.x, line.y, color=colour, gid=name, label=name, clip_on=False, **style)


def plot_reliability(
    table: Sequence[Mapping[str, float]], path: str | Path, title: str = "Calibration of the reward model"
) -> Figure:
    """Write the reliability diagram of a reward model as PNG. table: rows of `evaluation.calibration_table`."""
    if not table:
        raise UserError("the calibration table is empty; score at least one pair")
    chart = replace(reliability_chart(table), title=title)
    return write_figure(lambda figure: draw_chart(figure.add_subplot(), chart), path, (5.6, 4.6))


def plot_bars(
    models: Mapping[str, Mapping[str, float | None]], keys: Sequence[str], path: str | Path, title: str = ""
) -> Figure:
    """Write one panel per metric of `keys`, with one bar per model, as PNG; a missing value is a dash.

    models: {model: {metric: value}}. Raises UserError if no model has one of the metrics.
    """
    if not models or not keys:
        raise UserError("a comparison needs at least one model and one metric")
    for key in keys:
        if all(values.get(key) is None for values in models.values()):
            reported = sorted({name for values in models.values() for name in values})
            raise UserError(f"no model reports {key}; they report {', '.join(reported)}")
    names = list(models)

    def draw(figure: Figure) -> None:
        for axes, key in zip(add_panels(figure, len(keys)), keys, strict=True):
            values = [models[name].get(key) for name in names]
            heights = [0.0 if value is None else float(value) for value in values]
            colours = [LIGHT[colour] for colour in series_colours(len(names) + 1)[1:]]  # ink is too heavy for bars
            bars = axes.bar(names, heights, width=0.66, color=colours, gid=key)
            labels = ["–" if value is None else decimal(float(value)) for value in values]
            axes.bar_label(bars, labels, padding=3, fontsize=9)
            axes.set_title(label_of(key))
            axes.margins(y=0.16)
            axes.axhline(0, color=LIGHT["faint"], linewidth=0.8)
            axes.set_yticks([])

    return write_figure(draw, path, panel_inches(len(keys), height=2.5), title=title)
