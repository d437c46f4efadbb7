"""A chart as SVG: the coordinates that the page's template draws, in the colours of its reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_recipes.reports.chart import Chart
from rlhf_recipes.reports.layout import Layout, Line, lay_out
from rlhf_recipes.reports.text import decimal

WIDTH, HEIGHT = 460.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 448.0, 10.0, 212.0  # the edges of the plot inside the view box


@dataclass(frozen=True)
class SvgLine:
    """path: the strong line. raw_path: the values under a trend, else empty. last: the last value as text, or empty."""

    name: str
    colour: str
    dotted: bool
    path: str
    raw_path: str
    dots: Sequence[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class SvgChart:
    """A chart in units of a view box WIDTH wide and HEIGHT high; ticks are (position, label)."""

    title: str
    x: str
    lines: Sequence[SvgLine]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    bars: Sequence[tuple[float, float, float]]  # x, width, height
    bars_name: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = RIGHT
    bottom: float = BOTTOM


def svg_chart(chart: Chart) -> SvgChart:
    """Place everything that a chart shows."""
    layout = lay_out(chart)
    return SvgChart(
        title=chart.title,
        x=chart.x,
        lines=[_svg_line(line, layout, chart.show_last) for line in layout.lines],
        x_ticks=[(_place(layout, value, 0)[0], label) for value, label in layout.x_ticks],
        y_ticks=[(_place(layout, 0, value)[1], label) for value, label in layout.y_ticks],
        bars=[_bar(layout, *bar) for bar in layout.bars],
        bars_name=chart.bars_name,
    )


def _svg_line(line: Line, layout: Layout, show_last: bool) -> SvgLine:
    finite = line.drawn[np.isfinite(line.drawn)]
    points = zip(line.x, line.y, strict=True)
    return SvgLine(
        name=line.series.name,
        colour=line.series.colour,
        dotted=line.series.dotted,
        path=_path(layout, line.x, line.drawn),
        raw_path="" if line.trend is None else _path(layout, line.x, line.y),
        dots=[_place(layout, x, y) for x, y in points if np.isfinite(y)] if line.has_dots else [],
        last=decimal(float(finite[-1])) if show_last and len(finite) else "",
    )


def _bar(layout: Layout, low: float, high: float, share: float) -> tuple[float, float, float]:
    left, right = _place(layout, low, 0)[0], _place(layout, high, 0)[0]
    return left + 1, right - left - 2, share * (BOTTOM - TOP)


def _place(layout: Layout, x: float, y: float) -> tuple[float, float]:
    across = (x - layout.x[0]) / (layout.x[1] - layout.x[0])
    up = (y - layout.y[0]) / (layout.y[1] - layout.y[0])
    return LEFT + float(across) * (RIGHT - LEFT), BOTTOM - float(up) * (BOTTOM - TOP)


def _path(layout: Layout, x: np.ndarray, y: np.ndarray) -> str:
    """Return an SVG path through the points; it starts again after each gap."""
    path, command = [], "M"
    for point in zip(x, y, strict=True):
        if np.isfinite(point).all():
            across, down = _place(layout, *point)
            path.append(f"{command}{across:.1f} {down:.1f}")
        command = "L" if np.isfinite(point).all() else "M"
    return "".join(path)
