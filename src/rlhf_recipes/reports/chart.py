"""What a chart shows, as data: named lines of (x, y) points. `layout` places them, `svg` and `plots` draw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from rlhf_recipes.reports.style import series_colours

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart. `colour` is a name of the palette in `style`; a point that is not finite is a gap."""

    name: str
    points: Sequence[Point]
    colour: str = "ink"
    dotted: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar at the foot of a chart, from x = `low` to x = `high`. Heights compare bars with each other only."""

    low: float
    high: float
    height: float


@dataclass(frozen=True)
class Chart:
    """One chart.

    title: what is measured, with its unit.
    x: the name of the horizontal axis.
    bars, bars_name: bars at the foot, and their entry in the legend.
    show_last: whether a legend beside the chart gives the last value of each line.
    """

    title: str
    x: str
    series: Sequence[Series]
    bars: Sequence[Bar] = ()
    bars_name: str = ""
    show_last: bool = True


def chart_from_log(
    title: str,
    log_history: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    *,
    x: str = "step",
    by: str = "step",
    colours: Sequence[str] = (),
) -> Chart:
    """Make a chart of logged numbers; a key that was never logged gives no line.

    log_history: the entries of a Trainer's `state.log_history`.
    names: logged key -> name of its line.
    x: name of the horizontal axis. by: the logged key that this axis shows.
    colours: one name of the palette per key; by default the palette's order.
    """
    series = []
    for (key, name), colour in zip(names.items(), colours or series_colours(len(names)), strict=True):
        rows = [row for row in log_history if by in row and isinstance(row.get(key), Real)]
        if rows:
            series.append(Series(name, [(float(row[by]), float(row[key])) for row in rows], colour))
    return Chart(title, x, series)


def reliability_chart(rows: Sequence[Mapping[str, float]]) -> Chart:
    """Make a reliability diagram: accuracy against confidence, with the number of pairs per bin as bars.

    rows: what `evaluation.calibration_table` returns: `low`, `high`, `confidence`, `accuracy`, `count` of each bin.
    """
    accuracy = Series("accuracy", [(row["confidence"], row["accuracy"]) for row in rows])
    diagonal = Series("perfectly calibrated", [(0.5, 0.5), (1.0, 1.0)], "soft", dotted=True)
    return Chart(
        title="Calibration: accuracy by confidence",
        x="confidence of the reward model",
        series=[accuracy, diagonal],
        bars=[Bar(row["low"], row["high"], row["count"]) for row in rows],
        bars_name=f"pairs per bin (at most {max(row['count'] for row in rows):,.0f})",
        show_last=False,
    )
