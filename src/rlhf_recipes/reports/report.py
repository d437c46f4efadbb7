"""A report on disk: `report.html`, `report.md` and the pictures that the latter shows."""

from __future__ import annotations

from pathlib import Path

from rlhf_recipes.core.files import write_text
from rlhf_recipes.reports.html import page_html
from rlhf_recipes.reports.markdown import page_markdown
from rlhf_recipes.reports.page import Page
from rlhf_recipes.reports.plots import plot_charts


def write_page(folder: str | Path, page: Page) -> Path:
    """Write a page into a folder as `report.html`, `report.md` and `report-<section>.png`; return the path of the HTML.

    The HTML needs no other file, so it may be sent or moved alone.
    """
    folder = Path(folder)
    html = page_html(page)
    pictures = {}
    for section in page.sections:
        if section.charts:
            pictures[section.name] = f"report-{section.name}.png"
            plot_charts(section.charts, folder / pictures[section.name])
    write_text(folder / "report.md", page_markdown(page, pictures))
    return write_text(folder / "report.html", html)
