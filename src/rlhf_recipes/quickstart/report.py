"""The report of a run: one page to read and share, the same as Markdown, and a picture of the whole.

The data are plain dictionaries (see `Summary`); nothing is measured here.
"""

from pathlib import Path

from rlhf_recipes.core.files import write_text
from rlhf_recipes.quickstart.page import page
from rlhf_recipes.quickstart.picture import curves_picture, ladder_picture
from rlhf_recipes.quickstart.summary import Summary, check
from rlhf_recipes.quickstart.text import markdown


def write_report(folder: str | Path, summary: Summary) -> Path:
    """Write `report.html`, `report.md` and the pictures that the latter shows into `folder`; returns the page's path.

    The page stands alone: it may be sent or moved without the rest.
    """
    check(summary)
    folder = Path(folder)
    html = page(summary)
    curves = dict(summary.get("curves", {}))
    if "overoptimization" in summary:
        curves["overoptimization"] = summary["overoptimization"]["curves"]
    pictures = {}
    for section, charts in curves.items():
        if drawn := [curve for curve in charts if curve["series"]]:
            pictures[section] = curves_picture(drawn, folder / f"report-{section}.png").name
    ladder_picture(summary, folder / "ladder.png")
    write_text(folder / "report.md", markdown(summary, pictures))
    return write_text(folder / "report.html", html)
