"""Pictures of a run for places that show no page: one that tells the whole, and one of the curves of each section."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.quickstart import summary as words
from rlhf_recipes.quickstart.summary import Exchange, Summary
from rlhf_recipes.reports import SMOOTHED_FROM, Curve, finite_points, smooth, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of report.css in the light.
PAPER, CARD, INK, SOFT, LINE, FAINT, GOLD = "#fcfbf8", "#ffffff", "#1d1c1a", "#6b665d", "#e7e3da", "#a29b8e", "#a87408"
SERIF, SANS = "DejaVu Serif", "DejaVu Sans"  # both ship with matplotlib, so the picture looks the same everywhere
COLOUR = {"ink": INK, "accent": GOLD, "faint": FAINT}
EXAMPLES, ASKED_CHARS, TOLD_CHARS = 3, 46, 50


def ladder_picture(summary: Summary, path: str | Path) -> Path:
    """One PNG of 1600 x 900 that tells the run: title, the four stages, PPO's curves, three questions and answers."""
    words.check(summary)

    def draw(figure: Figure) -> None:
        _say(figure, 0.045, 0.935, f"rlhf-recipes   {words.eyebrow(summary)}".strip(), SOFT, 13)
        _say(figure, 0.045, 0.855, words.headline(summary), INK, 40, SERIF)
        steps = words.steps(summary)
        for place, step in enumerate(steps):
            _draw_step(figure, place, len(steps), step)
        curves = [curve for curve in summary.get("curves", {}).get("ppo", ()) if curve["series"]][:2]
        for place, curve in enumerate(curves):
            axes = figure.add_axes((0.068 + 0.235 * place, 0.105, 0.19, 0.285))
            _draw_curve(axes, curve)
        for place, exchange in enumerate(list(summary.get("exchanges", ()))[:EXAMPLES]):
            _draw_exchange(figure, 0.415 - 0.13 * place, exchange)
        if summary.get("exchanges"):
            told = "Held-out questions, as they come; ✓ ✗ by gold, which no model is trained on."
            _say(figure, 0.545, 0.035, told, FAINT, 11)

    return _write(draw, path, (16, 9), 100)


def curves_picture(curves: Sequence[Curve], path: str | Path) -> Path:
    """The charts of one section, two in a row, as PNG."""
    if not curves:
        raise UserError("no curves to draw; give at least one")
    rows = -(-len(curves) // 2)

    def draw(figure: Figure) -> None:
        for place, curve in enumerate(curves):
            down, across = divmod(place, 2)
            height = 1 / rows
            axes = figure.add_axes((0.075 + 0.5 * across, 1 - height * (down + 0.84), 0.395, height * 0.66))
            _draw_curve(axes, curve)

    return _write(draw, path, (10, 3.6 * rows), 140)


def _write(draw: Callable[[Figure], None], path: str | Path, inches: tuple[float, float], dots: int) -> Path:
    """Render on a figure of its own, never through pyplot, and write it in one step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=dots, facecolor=PAPER)
    draw(figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with warnings.catch_warnings():  # a model may write any character; one that the font lacks shows as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(unfinished, format="png", dpi=dots, facecolor=PAPER)
    os.replace(unfinished, path)
    return path


def _say(
    figure: Figure, x: float, y: float, text: str, colour: str, size: float, font: str = SANS, **style: Any
) -> Any:
    # Data may hold a dollar sign, which matplotlib would read as the beginning of a formula.
    return figure.text(x, y, text, color=colour, fontsize=size, family=font, parse_math=False, **style)


def _draw_step(figure: Figure, place: int, count: int, step: words.Step) -> None:
    """One rung: a card with its headline number and how far up gold it stands."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    gap = 0.0125
    width = (0.91 - gap * (count - 1)) / count
    left, foot, height = 0.045 + place * (width + gap), 0.525, 0.275
    card = FancyBboxPatch(
        (left, foot), width, height, boxstyle="round,pad=0,rounding_size=0.012", mutation_aspect=16 / 9,
        facecolor=CARD, edgecolor=LINE, linewidth=1.2, transform=figure.transFigure,
    )  # fmt: skip
    figure.add_artist(card)
    inner, inside = left + 0.016, width - 0.032
    _say(figure, inner, foot + 0.225, f"{place + 1}", FAINT, 15)
    _say(figure, inner + 0.014, foot + 0.225, step["name"], INK, 15, weight="bold")
    _say(figure, left + width - 0.016, foot + 0.225, step["time"], SOFT, 13, ha="right")
    _say(figure, inner, foot + 0.118, step["number"], GOLD if step["golden"] else INK, 40, SERIF)
    _say(figure, inner, foot + 0.08, step["label"], SOFT, 13)
    if step["gold"] is not None and not step["golden"]:
        _say(figure, left + width - 0.016, foot + 0.08, f"gold {step['gold_text']}", SOFT, 13, ha="right")
    if step["gold"] is not None:
        for share, colour in ((1.0, LINE), (min(1.0, max(0.0, step["gold"])), GOLD)):
            track = Rectangle((inner, foot + 0.036), inside * share, 0.009, color=colour, transform=figure.transFigure)
            figure.add_artist(track)


def _draw_exchange(figure: Figure, top: float, exchange: Exchange) -> None:
    """One question and what the last two stages that were asked said to it."""
    left = 0.545
    _say(figure, left, top, _short(exchange["prompt"], ASKED_CHARS), INK, 16, SERIF)
    for row, (stage, reply) in enumerate(list(exchange["replies"].items())[-2:]):
        y = top - 0.037 - 0.034 * row
        right = reply["right"] >= 0.5
        _say(figure, left, y, "✓" if right else "✗", GOLD if right else FAINT, 14)
        _say(figure, left + 0.016, y, words.name_of(stage), SOFT, 12.5)
        _say(figure, left + 0.088, y, _short(reply["text"], TOLD_CHARS) or "(nothing)", INK if right else SOFT, 13.5)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    axes.set_facecolor(PAPER)
    for series in curve["series"]:
        points = finite_points(series)
        colour = COLOUR[series.get("style", "ink")]
        if len(points) >= SMOOTHED_FROM:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, alpha=0.25)
            points = smooth(points)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, label=series["name"])
    title = axes.set_title(curve["title"], loc="left", color=INK, fontsize=11.5, family=SANS, weight="bold", pad=10)
    label = axes.set_xlabel(curve["x"], color=SOFT, fontsize=10, family=SANS, loc="right")
    for text in (title, label):
        text.set_parse_math(False)
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=LINE)
    axes.tick_params(length=0, labelsize=10, labelcolor=SOFT)
    for axis, (low, high), most in ((axes.xaxis, axes.get_xlim(), 5), (axes.yaxis, axes.get_ylim(), 6)):
        marks = ticks(low, high, most)
        axis.set_ticks([value for value, _ in marks], [label for _, label in marks])
    if len(curve["series"]) > 1:
        for text in axes.legend(frameon=False, fontsize=9, labelcolor=SOFT).get_texts():
            text.set_parse_math(False)


def _short(text: str, width: int) -> str:
    return textwrap.shorten(" ".join(text.split()), width, placeholder=" …")
