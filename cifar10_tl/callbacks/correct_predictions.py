"""Images that were predicted correctly, of the best validation and of the test."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from cifar10_tl.callbacks.evaluation_figure import EvaluationFigure, prediction_grid
from cifar10_tl.evaluation import Evaluation


class CorrectPredictions(EvaluationFigure):
    """Up to ``num_images`` right predictions, spread evenly over the data, with their probabilities."""

    tag, title = "correct", "Correct predictions"

    def __init__(self, num_images: int = 25, every_n_seconds: float = 30.0) -> None:
        super().__init__(every_n_seconds)
        self.num_images = num_images

    def draw(self, evaluation: Evaluation, split: Any, heading: str) -> Figure:
        """See :func:`cifar10_tl.figures.prediction_grid`."""
        return prediction_grid(evaluation, evaluation.correct(self.num_images), split, heading)
