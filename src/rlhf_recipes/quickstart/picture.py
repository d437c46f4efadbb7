"""The run in one picture, for places that show no page: `ladder.png`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.quickstart.story import Card, cards, eyebrow, headline
from rlhf_recipes.quickstart.summary import Exchange, Summary, name_of
from rlhf_recipes.reports import LIGHT, SANS, SERIF, draw_chart, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES, PIXELS_PER_INCH = (16, 9), 100
EXAMPLES, QUESTION_CHARACTERS, ANSWER_CHARACTERS = 3, 46, 50
# Positions and sizes below are shares of the picture's width and height.
LEFT, WIDTH = 0.045, 0.91


def ladder_picture(summary: Summary, path: str | Path) -> Path:
    """Write one PNG of 1600 x 900 pixels: title, the cards of the stages, PPO's first two charts, three exchanges."""

    def draw(figure: Figure) -> None:
        _write(figure, LEFT, 0.935, f"rlhf-recipes   {eyebrow(summary)}".strip(), "soft", 13)
        _write(figure, LEFT, 0.855, headline(summary), "ink", 40, SERIF)
        stage_cards = cards(summary)
        for index, card in enumerate(stage_cards):
            _draw_card(figure, index, len(stage_cards), card)
        charts = [chart for chart in summary.get("charts", {}).get("ppo", ()) if chart.series]
        for index, chart in enumerate(charts[:2]):
            draw_chart(figure.add_axes((0.068 + 0.235 * index, 0.105, 0.19, 0.285)), chart)
        exchanges = list(summary.get("exchanges", ()))[:EXAMPLES]
        for index, exchange in enumerate(exchanges):
            _draw_exchange(figure, 0.415 - 0.13 * index, exchange)
        if exchanges:
            note = "Held-out questions; ✓ ✗ by the gold judge, which no model is trained on."
            _write(figure, 0.545, 0.035, note, "faint", 11)

    write_figure(draw, path, INCHES, pixels_per_inch=PIXELS_PER_INCH, free=True)
    return Path(path)


def _write(
    figure: Figure, x: float, y: float, text: str, colour: str, size: float, font: str = SANS, **style: Any
) -> None:
    figure.text(x, y, text, color=LIGHT[colour], fontsize=size, family=font, **style)


def _draw_card(figure: Figure, index: int, count: int, card: Card) -> None:
    """Draw the card of one stage: its headline number, and its gold score as a bar."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    gap, padding = 0.0125, 0.016
    width = (WIDTH - gap * (count - 1)) / count
    left, bottom, height = LEFT + index * (width + gap), 0.525, 0.275
    inner_left, inner_right = left + padding, left + width - padding
    box = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.012", mutation_aspect=16 / 9,
        facecolor=LIGHT["card"], edgecolor=LIGHT["border"], linewidth=1.2, transform=figure.transFigure,
    )  # fmt: skip
    figure.add_artist(box)
    _write(figure, inner_left, bottom + 0.225, f"{index + 1}", "faint", 15)
    _write(figure, inner_left + 0.014, bottom + 0.225, card["name"], "ink", 15, weight="bold")
    _write(figure, inner_right, bottom + 0.225, card["time"], "soft", 13, ha="right")
    _write(figure, inner_left, bottom + 0.118, card["number"], "accent" if card["golden"] else "ink", 40, SERIF)
    _write(figure, inner_left, bottom + 0.08, card["label"], "soft", 13)
    if card["gold"] is None:
        return
    if not card["golden"]:
        _write(figure, inner_right, bottom + 0.08, f"gold {card['gold_text']}", "soft", 13, ha="right")
    for share, colour in ((1.0, "border"), (min(1.0, max(0.0, card["gold"])), "accent")):
        bar_width = (inner_right - inner_left) * share
        bar = (inner_left, bottom + 0.036), bar_width, 0.009
        figure.add_artist(Rectangle(*bar, color=LIGHT[colour], transform=figure.transFigure))


def _draw_exchange(figure: Figure, top: float, exchange: Exchange) -> None:
    """Write one question and the replies of its last two stages."""
    left = 0.545
    _write(figure, left, top, _shorten(exchange["prompt"], QUESTION_CHARACTERS), "ink", 16, SERIF)
    for row, (stage, reply) in enumerate(list(exchange["replies"].items())[-2:]):
        y = top - 0.037 - 0.034 * row
        right = reply["right"] >= 0.5
        text = _shorten(reply["text"], ANSWER_CHARACTERS) or "(empty answer)"
        _write(figure, left, y, "✓" if right else "✗", "accent" if right else "faint", 14)
        _write(figure, left + 0.016, y, name_of(stage), "soft", 12.5)
        _write(figure, left + 0.088, y, text, "ink" if right else "soft", 13.5)


def _shorten(text: str, width: int) -> str:
    return textwrap.shorten(" ".join(text.split()), width, placeholder=" …")
