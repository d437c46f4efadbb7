"""What a report says, as data: a page of sections with text, charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_recipes.reports.chart import Chart

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class TableRow:
    """One row of a table. note: a small line under the name."""

    name: str
    cells: Sequence[str]
    note: str = ""
    highlighted: bool = False


@dataclass(frozen=True)
class Table:
    """A table of numbers as text. columns: the header of each cell; the column of row names has none."""

    columns: Sequence[str]
    rows: Sequence[TableRow]


@dataclass(frozen=True)
class Section:
    """One section of a page, in this order: title, text, charts, table, and what only its stage can draw.

    name: the file name of its charts is `report-<name>.png`.
    html, markdown: the same content in both languages, made by the stage; see `render_html`.
    """

    name: str
    title: str = ""
    text: str = ""
    charts: Sequence[Chart] = ()
    table: Table | None = None
    html: Markup | None = None
    markdown: str = ""


@dataclass(frozen=True)
class Reproduction:
    """How to get the same numbers again. details: lines such as hardware, seed, date, versions."""

    command: str
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A whole report.

    eyebrow: the small line above the title. summary: the paragraph under it.
    css: style rules of the stage's own sections; code, never data.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    eyebrow: str = ""
    reproduction: Reproduction | None = None
    css: str = ""
