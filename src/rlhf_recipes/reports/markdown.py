"""A page as Markdown, for places that render no HTML page."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_recipes.core.markdown import escape_markdown, table
from rlhf_recipes.reports.page import Page, Reproduction, Section, Table


def page_markdown(page: Page, pictures: Mapping[str, str]) -> str:
    """Return a page as Markdown. pictures: section name -> the file with its charts, in the folder of the report."""
    parts = [f"# {escape_markdown(page.title)}", escape_markdown(page.summary)]
    for section in page.sections:
        parts += _section(section, pictures.get(section.name))
    if page.reproduction:
        parts += ["## How to reproduce", _reproduction(page.reproduction)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section, picture: str | None) -> list[str]:
    parts = [
        f"## {escape_markdown(section.title)}" if section.title else "",
        escape_markdown(section.text),
        f"![Charts]({picture})" if picture else "",
        _table(section.table) if section.table else "",
        section.markdown,
    ]
    return [part for part in parts if part]


def _table(content: Table) -> str:
    rows = []
    for row in content.rows:
        note = f", {escape_markdown(row.note)}" if row.note else ""
        rows.append([f"**{escape_markdown(row.name)}**{note}", *(escape_markdown(cell) for cell in row.cells)])
    header = ["", *(escape_markdown(column) for column in content.columns)]
    return table(header, rows, range(1, len(header)))


def _reproduction(reproduction: Reproduction) -> str:
    code = "\n".join(f"    {line}" for line in reproduction.command.splitlines())
    return "\n\n".join([code, *(escape_markdown(detail) for detail in reproduction.details)])
