"""The data of a chart: named lines of (x, y) points."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class _NamedPoints(TypedDict):
    name: str
    points: Sequence[tuple[float, float]]


class Series(_NamedPoints, total=False):
    """One line of a chart: its name and its (x, y) points. style: `accent` is kept for gold, the truth."""

    style: Literal["ink", "accent", "faint"]


class Curve(TypedDict):
    """One chart. title says what is measured and its unit; x names the horizontal axis."""

    title: str
    x: str
    series: Sequence[Series]


def curve_of(
    title: str, log_history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], x: str = "step", by: str = "step"
) -> Curve:
    """A chart of logged numbers: `keys` maps a logged key to the name of its line; a name with "gold" in it is golden.

    x: the axis in words. by: the logged key that the axis shows.
    """
    series: list[Series] = []
    for key, name in keys.items():
        points = [(float(row[by]), float(row[key])) for row in log_history if row.get(key) is not None and by in row]
        if points:
            style: Literal["ink", "accent", "faint"] = "accent" if "gold" in name else "faint" if series else "ink"
            series.append({"name": name, "points": points, "style": style})
    return {"title": title, "x": x, "series": series}


def beside(good: Curve, bad: Curve, names: tuple[str, str] = ("this run", "the bad setting")) -> Curve:
    """The first line of each of two charts in one, under new names: the good run as it was, the bad one faint."""
    first, second = good["series"][0], bad["series"][0]
    series: list[Series] = [
        {"name": names[0], "points": first["points"], "style": first.get("style", "ink")},
        {"name": names[1], "points": second["points"], "style": "faint"},
    ]
    return {"title": good["title"], "x": good["x"], "series": series}
