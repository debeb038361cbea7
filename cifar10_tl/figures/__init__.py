"""Figures for TensorBoard and the output folder: arrays in, `matplotlib.figure.Figure` out.

Nothing here opens a pyplot figure, writes a file or changes rcParams, so it is safe inside a training loop.
The pages are laid out by hand: one axes whose unit is the inch, texts measured before they are placed,
pictures composed into one image. No text is cut off, and it draws several times faster than subplots with
a layout engine.
"""

from cifar10_tl.figures.calibration import confidence_histogram, reliability_diagram
from cifar10_tl.figures.classes import class_bars
from cifar10_tl.figures.confusion import confusion_matrix
from cifar10_tl.figures.corruption import corruption_curves
from cifar10_tl.figures.grids import prediction_grid, sample_grid
from cifar10_tl.figures.lines import curves
from cifar10_tl.figures.page import legible

__all__ = [
    "class_bars",
    "confidence_histogram",
    "confusion_matrix",
    "corruption_curves",
    "curves",
    "legible",
    "prediction_grid",
    "reliability_diagram",
    "sample_grid",
]
