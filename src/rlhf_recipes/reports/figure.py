"""A matplotlib figure in the common style, written as PNG in one step."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_recipes.reports.style import MATPLOTLIB_STYLE, PIXELS_PER_INCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_figure(
    draw: Callable[[Figure], None],
    path: str | Path,
    inches: tuple[float, float],
    *,
    title: str = "",
    pixels_per_inch: int = PIXELS_PER_INCH,
    free: bool = False,
) -> Figure:
    """Let `draw` fill a figure of this size in the common style, write it to `path` as PNG atomically, and return it.

    free: `draw` places everything itself; otherwise matplotlib arranges the axes so that no text overlaps.
    pyplot and the caller's rcParams stay untouched.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(MATPLOTLIB_STYLE), warnings.catch_warnings():
        # A model may write any character; one that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=inches, dpi=pixels_per_inch, layout=None if free else "constrained")
        if not free:
            figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.05)
        if title:
            figure.suptitle(title, x=0.012, ha="left")
        draw(figure)
        image = io.BytesIO()
        figure.savefig(image, format="png")  # inside the block: ticks are made only now
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(image.getvalue())
    os.replace(temporary, path)
    return figure


def add_panels(figure: Figure, count: int) -> list[Axes]:
    """Add `count` axes to a figure, in rows of three, or of two if that leaves no hole."""
    rows, columns = _grid_shape(count)
    return [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def panel_inches(count: int, height: float = 2.7) -> tuple[float, float]:
    """Return a figure size for `count` panels that is readable at the width of a README."""
    rows, columns = _grid_shape(count)
    return (6.4, height + 1.0) if columns == 1 else (3.7 * columns, height * rows + 0.4)


def _grid_shape(count: int) -> tuple[int, int]:
    columns = 2 if count in (2, 4) else min(3, count)
    return -(-count // columns), columns
