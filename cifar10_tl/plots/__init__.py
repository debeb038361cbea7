"""Figures for TensorBoard and the run folder: arrays in, :class:`matplotlib.figure.Figure` out."""

from cifar10_tl.plots.curves import curves
from cifar10_tl.plots.evaluation import confusion_matrix_figure, correct_figure, evaluation_figures, incorrect_figure
from cifar10_tl.plots.gradient_flow import gradient_flow
from cifar10_tl.plots.image_grid import sample_grid
from cifar10_tl.plots.search import importance_bars, search_history
from cifar10_tl.plots.style import legible, to_png

__all__ = [
    "confusion_matrix_figure",
    "correct_figure",
    "curves",
    "evaluation_figures",
    "gradient_flow",
    "importance_bars",
    "incorrect_figure",
    "legible",
    "sample_grid",
    "search_history",
    "to_png",
]
