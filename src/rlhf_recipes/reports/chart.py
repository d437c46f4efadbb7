"""The geometry of a chart: where lines, ticks and labels stand.

The page makes SVG of it, in the colours of its reader.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_recipes.reports.numbers import decimal
from rlhf_recipes.reports.series import Curve, Series

WIDTH, HEIGHT = 460.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 38.0
SMOOTHED_FROM = 60  # points; a shorter line is drawn as it is


@dataclass(frozen=True)
class Line:
    """path: what is drawn. raw: the points under a trend, empty where the path is the points."""

    name: str
    style: str
    path: str
    raw: str
    last: str


@dataclass(frozen=True)
class Chart:
    """All places in units of a view box WIDTH wide and HEIGHT high; ticks are (place, label)."""

    title: str
    x: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bars: list[tuple[float, float, float]]  # x, width, height, at the foot
    diagonal: str = ""
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    foot: float = HEIGHT - BOTTOM


class _Scale:
    """Values to places."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = _widened(x), _widened(y)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        places = [self.place(x, y) for x, y in points]
        return "".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(places))


def chart_of(curve: Curve) -> Chart:
    """The chart of a curve; points that are not finite are left out."""
    series = [(one["name"], one.get("style", "ink"), finite_points(one)) for one in curve["series"]]
    points = [point for _, _, of_one in series for point in of_one] or [(0.0, 0.0), (1.0, 1.0)]
    scale = _Scale(_range([x for x, _ in points]), _range([y for _, y in points], air=0.06))
    lines = []
    for name, style, of_one in series:
        if of_one:
            trend = smooth(of_one) if len(of_one) >= SMOOTHED_FROM else []
            path, raw = scale.path(trend or of_one), scale.path(of_one) if trend else ""
            lines.append(Line(name, style, path, raw, decimal((trend or of_one)[-1][1])))
    x_ticks = [(scale.place(value, 0)[0], label) for value, label in ticks(*scale.x, 5)]
    y_ticks = [(scale.place(0, value)[1], label) for value, label in ticks(*scale.y, 6)]
    return Chart(curve["title"], curve["x"], lines, x_ticks, y_ticks, [])


def reliability_chart(rows: Sequence[Mapping[str, float]]) -> Chart:
    """Accuracy against confidence, with the number of pairs in each bin as bars at the foot."""
    scale = _Scale((0.5, 1.0), (min(0.5, *(row["accuracy"] for row in rows)), 1.0))
    path = scale.path([(row["confidence"], row["accuracy"]) for row in rows])
    most = max(row["count"] for row in rows)
    bars = []
    for row in rows:
        (low, _), (high, _) = scale.place(row["low"], 0), scale.place(row["high"], 0)
        bars.append((low + 1, high - low - 2, 44 * row["count"] / most))
    line = Line("share of pairs it orders rightly", "ink", path, "", "")
    x_ticks = [(scale.place(value, 0)[0], label) for value, label in ticks(0.5, 1.0, 5)]
    y_ticks = [(scale.place(0, value)[1], label) for value, label in ticks(*scale.y, 6)]
    diagonal = scale.path([(0.5, 0.5), (1.0, 1.0)])
    return Chart(
        "Is it sure when it is right?", "confidence of the reward model", [line], x_ticks, y_ticks, bars, diagonal
    )


def finite_points(series: Series) -> list[tuple[float, float]]:
    """The points of a line that have a place."""
    return [(float(x), float(y)) for x, y in series["points"] if math.isfinite(x) and math.isfinite(y)]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The trend of a long line: a centred Gaussian mean, 1/60 of its points wide, which does not lag."""
    values = np.array([y for _, y in points])
    place = np.arange(len(values))
    weights = np.exp(-0.5 * ((place[:, None] - place[None, :]) / (len(values) / 60)) ** 2)
    trend = (weights @ values) / weights.sum(axis=1)
    return [(x, float(y)) for (x, _), y in zip(points, trend, strict=True)]


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """At most `most` + 1 round values from low to high, and how they are written."""
    rough = (high - low) / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * size for size in (1, 2, 2.5, 5, 10) if unit * size >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if round(step / unit, 3) == 2.5 else 0))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, f"{number * step:,.{digits}f}") for number in range(first, last + 1)]


def _range(values: Sequence[float], air: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if air and low >= 0 and low < 0.4 * high:
        low = 0.0  # a measure that comes near zero is shown from zero
    spread = (high - low) * air
    return (low - spread if low else low), high + spread


def _widened(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    return (low, high) if high > low else (low - 0.5, high + 0.5)
