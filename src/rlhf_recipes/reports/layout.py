"""What both renderers of a chart share: the range of its axes, their ticks, and the trend of a long line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_recipes.reports.chart import Chart, Series

SMOOTHED_FROM = 60  # points; a shorter line is drawn as it is
DOTTED_UP_TO = 12  # points; so few are also drawn as dots, and a single point is visible
BAR_SHARE = 0.2  # height of the highest bar as a share of the chart

Range = tuple[float, float]
Tick = tuple[float, str]  # value, label


@dataclass(frozen=True)
class Line:
    """One line, ready to draw. x, y: (points,), NaN where a value is not finite. trend: (points,) or None."""

    series: Series
    x: np.ndarray
    y: np.ndarray
    trend: np.ndarray | None

    @property
    def drawn(self) -> np.ndarray:
        """The values of the strong line: the trend if there is one, else the values."""
        return self.y if self.trend is None else self.trend

    @property
    def has_dots(self) -> bool:
        """Whether each point is drawn as a dot too."""
        return len(self.x) <= DOTTED_UP_TO and not self.series.dotted


@dataclass(frozen=True)
class Layout:
    """A chart in the units of its data. bars: (low, high, share of the chart's height)."""

    lines: Sequence[Line]
    x: Range
    y: Range
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    bars: Sequence[tuple[float, float, float]]


def lay_out(chart: Chart) -> Layout:
    """Choose ranges and ticks of a chart and smooth its long lines."""
    lines = [_line(series) for series in chart.series if len(series.points)]
    x_values = [float(x) for line in lines for x in line.x if math.isfinite(x)]
    x_values += [edge for bar in chart.bars for edge in (bar.low, bar.high)]
    y_values = [float(y) for line in lines for y in line.y if math.isfinite(y)]
    x, y = _range(x_values), _range(y_values, margin=0.06)
    whole = all(value.is_integer() for value in x_values)
    highest = max((bar.height for bar in chart.bars), default=0.0) or 1.0
    bars = [(bar.low, bar.high, BAR_SHARE * bar.height / highest) for bar in chart.bars]
    return Layout(lines, x, y, ticks(*x, 5, whole), ticks(*y, 6), bars)


def _line(series: Series) -> Line:
    points = np.asarray(series.points, dtype=np.float64)
    points = np.where(np.isfinite(points), points, np.nan)
    x, y = points[:, 0], points[:, 1]
    return Line(series, x, y, smooth(y) if len(y) >= SMOOTHED_FROM else None)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the trend of a series: a centred Gaussian mean, 1/40 of the series wide. Unlike a running mean it does not lag.

    Near the ends, and around values that are not finite, the remaining weights are normalised. values: (points,).
    """
    width = len(values) / 40
    reach = np.arange(-int(3 * width), int(3 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    finite = np.isfinite(values)
    padded_sum = np.convolve(np.where(finite, values, 0.0), kernel, mode="full")
    padded_weight = np.convolve(finite.astype(float), kernel, mode="full")
    middle = slice(len(reach) // 2, len(reach) // 2 + len(values))
    with np.errstate(invalid="ignore"):
        return padded_sum[middle] / padded_weight[middle]


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[Tick]:
    """Return at most `most` + 1 round values from low to high with their labels; `whole` allows whole numbers only."""
    smallest_step = (high - low) / most
    unit = 10 ** math.floor(math.log10(smallest_step))
    step = next(unit * size for size in (1, 2, 2.5, 5, 10) if unit * size >= smallest_step * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    digits = next((digits for digits in range(5) if math.isclose(step, round(step, digits), rel_tol=1e-6)), None)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [number * step for number in range(first, last + 1)]
    return [(value, f"{value:.3g}" if digits is None else f"{value:,.{digits}f}") for value in values]


def _range(values: Sequence[float], margin: float = 0.0) -> Range:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if 0 <= low < 0.4 * high:
        low = 0.0  # an axis that comes near zero starts at zero
    space = (high - low) * margin
    low, high = low - space if low else low, high + space
    widening = 0.0 if high > low else abs(low) / 10 or 0.5  # a single value is drawn in the middle
    return low - widening, high + widening
