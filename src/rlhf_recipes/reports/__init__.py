"""What a run shows to people: pages of sections, charts as SVG and PNG, numbers as text."""

from rlhf_recipes.reports.chart import Chart, Series, chart_from_log, reliability_chart
from rlhf_recipes.reports.curves import plot_curves
from rlhf_recipes.reports.figure import write_figure
from rlhf_recipes.reports.html import render_html
from rlhf_recipes.reports.page import Page, Reproduction, Section, Table, TableRow
from rlhf_recipes.reports.plots import draw_chart, plot_bars, plot_reliability
from rlhf_recipes.reports.report import write_page
from rlhf_recipes.reports.style import LIGHT, SANS, SERIF
from rlhf_recipes.reports.text import decimal, duration, percent

__all__ = [
    "LIGHT",
    "SANS",
    "SERIF",
    "Chart",
    "Page",
    "Reproduction",
    "Section",
    "Series",
    "Table",
    "TableRow",
    "chart_from_log",
    "decimal",
    "draw_chart",
    "duration",
    "percent",
    "plot_bars",
    "plot_curves",
    "plot_reliability",
    "reliability_chart",
    "render_html",
    "write_figure",
    "write_page",
]
