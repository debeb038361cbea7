"""The confusion matrix, of the best validation and of the test."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from cifar10_tl import figures
from cifar10_tl.callbacks.evaluation_figure import EvaluationFigure
from cifar10_tl.evaluation import Evaluation


class ConfusionMatrix(EvaluationFigure):
    """Counts and row percentages of true against predicted classes."""

    tag, title = "confusion_matrix", "Confusion matrix"

    def draw(self, evaluation: Evaluation, split: Any, heading: str) -> Figure:
        """See :func:`cifar10_tl.figures.confusion_matrix`."""
        return figures.confusion_matrix(evaluation.confusion_matrix.numpy(), evaluation.class_names, heading=heading)
