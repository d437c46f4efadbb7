"""What a run shows to people: pages, charts, plots, numbers as text."""

from rlhf_recipes.reports.chart import SMOOTHED_FROM, chart_of, finite_points, reliability_chart, smooth, ticks
from rlhf_recipes.reports.comparison import plot_ladder, plot_reliability
from rlhf_recipes.reports.curves import plot_curves
from rlhf_recipes.reports.numbers import decimal, duration, percent
from rlhf_recipes.reports.series import Curve, beside, curve_of

__all__ = [
    "SMOOTHED_FROM",
    "Curve",
    "beside",
    "chart_of",
    "curve_of",
    "decimal",
    "duration",
    "finite_points",
    "percent",
    "plot_curves",
    "plot_ladder",
    "plot_reliability",
    "reliability_chart",
    "smooth",
    "ticks",
]
