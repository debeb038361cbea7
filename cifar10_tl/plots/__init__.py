"""Figures for TensorBoard and the run folder: arrays in, :class:`matplotlib.figure.Figure` out.

The pages are laid out by hand: text is measured before it is placed and pictures are composed into one image. No text
is cut off or overlaps, and it draws several times faster than subplots with a layout engine.
"""

from cifar10_tl.plots.calibration import confidence_histogram, reliability_diagram
from cifar10_tl.plots.confusion_matrix import confusion_matrix
from cifar10_tl.plots.curves import curves
from cifar10_tl.plots.evaluation import (
    confusion_matrix_figure,
    correct_figure,
    evaluation_figures,
    incorrect_figure,
)
from cifar10_tl.plots.image_grid import prediction_grid, sample_grid
from cifar10_tl.plots.per_class import class_bars
from cifar10_tl.plots.style import legible, to_png

__all__ = [
    "class_bars",
    "confidence_histogram",
    "confusion_matrix",
    "confusion_matrix_figure",
    "correct_figure",
    "curves",
    "evaluation_figures",
    "incorrect_figure",
    "legible",
    "prediction_grid",
    "reliability_diagram",
    "sample_grid",
    "to_png",
]
