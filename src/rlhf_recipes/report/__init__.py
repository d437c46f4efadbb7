"""The report of a run: one page to read and share, the same as Markdown, and a picture of the whole.

The data are plain dictionaries (see `Summary`); nothing is measured here.
"""

from pathlib import Path

from rlhf_recipes.artifacts import write_text
from rlhf_recipes.report.page import page
from rlhf_recipes.report.summary import Curve, Exchange, Reply, Series, Summary, check, curve_of

__all__ = ["Curve", "Exchange", "Reply", "Series", "Summary", "curve_of", "write_report"]


def write_report(folder: str | Path, summary: Summary) -> Path:
    """Write `report.html`, `report.md` and the pictures it shows into `folder`; returns the path of the page."""
    check(summary)
    folder = Path(folder)
    return write_text(folder / "report.html", page(summary))
