"""Images that were predicted incorrectly, of the best validation and of the test."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from cifar10_tl.callbacks.evaluation_figure import EvaluationFigure, prediction_grid
from cifar10_tl.evaluation import Evaluation


class IncorrectPredictions(EvaluationFigure):
    """Up to ``num_images`` wrong predictions with their true labels, the most confident mistakes first."""

    tag, title = "incorrect", "Incorrect predictions, the most confident first"

    def __init__(self, num_images: int = 25, every_n_seconds: float = 30.0) -> None:
        super().__init__(every_n_seconds)
        self.num_images = num_images

    def draw(self, evaluation: Evaluation, split: Any, heading: str) -> Figure:
        """See :func:`cifar10_tl.figures.prediction_grid`."""
        return prediction_grid(evaluation, evaluation.mistakes(self.num_images), split, heading)
