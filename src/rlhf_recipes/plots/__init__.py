"""Figures of a run: training curves, a judge's reliability, the ladder of stages, over-optimisation.

Every function draws on a `matplotlib.figure.Figure` of its own, never through pyplot, so figures may be drawn from a
Trainer callback. Each writes a PNG in one step (a reader never meets half a file) and returns the figure. matplotlib
is imported at the first call.
"""

from rlhf_recipes.plots.canvas import figure_to_data_uri
from rlhf_recipes.plots.comparison import plot_ladder, plot_overoptimization, plot_reliability
from rlhf_recipes.plots.curves import plot_curves

__all__ = ["figure_to_data_uri", "plot_curves", "plot_ladder", "plot_overoptimization", "plot_reliability"]
