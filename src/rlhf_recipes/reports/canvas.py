"""The common look of all figures, and how a figure becomes a file or a `data:` address."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision; its yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
INK, FAINT = "#262626", "#8A8A8A"
PIXELS_PER_INCH = 150
SMOOTHED_FROM = 40  # points; a shorter series is shown as it is
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so a figure looks the same everywhere
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.use_mathtext": True,
    "figure.facecolor": "white",
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "rlhf-recipes",  # the same calls give the same bytes
}

LABELS = {
    "loss": "training",
    "eval_loss": "held out",
    "objective/scores": "reward model's score",
    "objective/rlhf_reward": "score minus KL penalty",
    "policy/approxkl_avg": "approximate KL",
    "policy/clipfrac_avg": "policy clipped (share)",
    "val/clipfrac_avg": "value clipped (share)",
    "kl": "KL to the reference (nats per answer)",
    "update": "PPO update",
    "eos_share": "stopped by EOS",
    "distinct_2": "distinct-2",
}


def write_figure(draw: Callable[[Figure], None], path: str | Path, title: str, inches: tuple[float, float]) -> Figure:
    """Let `draw` fill a figure of that size in the common style, write it to `path` as PNG, and return it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=inches, dpi=PIXELS_PER_INCH, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.05)
        if title:
            figure.suptitle(title, x=0.012, ha="left")
        draw(figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(_render(figure, "png"))
    os.replace(unfinished, path)
    return figure


def figure_to_data_uri(figure: Figure, format: str = "svg") -> str:
    """The figure as a `data:` address (`svg` or `png`) for the `src` of an `<img>` in a page that stands alone."""
    kinds = {"svg": "image/svg+xml", "png": "image/png"}
    if format not in kinds:
        raise UserError(f"cannot embed a figure as {format!r}; choose svg or png")
    encoded = base64.b64encode(_render(figure, format)).decode("ascii")
    return f"data:{kinds[format]};base64,{encoded}"


def _render(figure: Figure, format: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):  # ticks are made, and text is turned into shapes, only now
        figure.savefig(buffer, format=format, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def grid_of_axes(figure: Figure, count: int) -> list[Axes]:
    """`count` axes in rows of three, or of two where that leaves no hole."""
    rows, columns = _grid_shape(count)
    return [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def grid_inches(count: int, height: float = 2.7) -> tuple[float, float]:
    """A figure size for `count` panels that is readable at the width of a README."""
    rows, columns = _grid_shape(count)
    return (6.4, height + 1.0) if columns == 1 else (3.7 * columns, height * rows + 0.4)


def _grid_shape(count: int) -> tuple[int, int]:
    columns = 2 if count in (2, 4) else min(3, count)
    return -(-count // columns), columns


def colours(count: int) -> list[str]:
    """`count` colours, the palette repeated where it is too short."""
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def draw_series(axes: Axes, x: np.ndarray, y: np.ndarray, key: str, colour: str, label: str | None = None) -> None:
    """One series: a short one with a mark at each point, a long one faint under its trend.

    Lines can be found again by their gid: `key` for the data as given, `<key>/smoothed` for the trend.
    """
    label = label_of(key) if label is None else label
    if len(x) < SMOOTHED_FROM:
        axes.plot(x, y, color=colour, gid=key, label=label, marker="o", markersize=3.5)
        return
    axes.plot(x, y, color=colour, gid=key, alpha=0.22, linewidth=1)
    axes.plot(x, smooth(y), color=colour, gid=f"{key}/smoothed", label=label)


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred Gaussian mean, 1/40 of the series wide; unlike a running mean it does not lag.

    Near the ends, and around values that are not finite, the weights that remain are normalised.
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


def finish_curves(axes: Axes, x_label: str, legend: bool) -> None:
    """Grid, axis label, whole-number steps and, where one name is not enough, a legend."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid()
    if legend:
        axes.legend(loc="best", handlelength=1.4)


def label_of(key: str) -> str:
    """A logged key in words."""
    if key in LABELS:
        return LABELS[key]
    words = key.removeprefix("eval_").rsplit("/", 1)[-1].replace("_", " ")
    return f"{words}, held out" if key.startswith("eval_") else words


def short_number(value: float) -> str:
    """Three digits that matter, without an exponent where one is not needed."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.2f}"
