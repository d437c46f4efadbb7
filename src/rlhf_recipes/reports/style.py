"""The look of everything a run shows: one palette and one style for PNG figures, SVG charts and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# blue ... sky: Okabe and Ito's colours, which stay apart for readers with any colour vision.
LIGHT = {
    "paper": "#fcfbf8", "card": "#ffffff", "ink": "#1d1c1a", "soft": "#6b665d", "faint": "#a29b8e",
    "border": "#e7e3da", "grid": "#eeebe4", "accent": "#a87408", "accent-wash": "#f8f0dc",
    "blue": "#0072b2", "vermilion": "#d55e00", "green": "#009e73", "purple": "#cc79a7", "sky": "#56b4e9",
}  # fmt: skip
DARK = {
    "paper": "#161512", "card": "#1d1c18", "ink": "#ece8df", "soft": "#a39c8f", "faint": "#777065",
    "border": "#34312a", "grid": "#2a2822", "accent": "#e2b04a", "accent-wash": "#2b2413",
    "blue": "#4ba3db", "vermilion": "#f08a3c", "green": "#2fc79b", "purple": "#e09cc3", "sky": "#8fd0f5",
}  # fmt: skip
SERIES_COLOURS = ("ink", "blue", "vermilion", "green", "purple", "sky")  # the order in which a chart uses them

SANS, SERIF = "DejaVu Sans", "DejaVu Serif"  # both ship with matplotlib, so a figure looks the same everywhere
PIXELS_PER_INCH = 150
MATPLOTLIB_STYLE: Mapping[str, Any] = {
    "font.family": SANS,
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": LIGHT["soft"],
    "axes.facecolor": LIGHT["paper"],
    "axes.axisbelow": True,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    "figure.facecolor": LIGHT["paper"],
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # data may hold a dollar sign, which would start a formula
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": LIGHT["border"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": LIGHT["soft"],
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}


def series_colours(count: int) -> Sequence[str]:
    """Return `count` names of colours; the palette repeats if it is too short."""
    return [SERIES_COLOURS[index % len(SERIES_COLOURS)] for index in range(count)]


def css_variables(palette: Mapping[str, str]) -> str:
    """Return a palette as CSS custom properties: `--ink: #1d1c1a; ...`."""
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())
