"""Figures of an evaluation, drawn by the training callbacks and by the evaluate command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from cifar10_tl.plots.calibration import confidence_histogram, reliability_diagram
from cifar10_tl.plots.confusion_matrix import confusion_matrix
from cifar10_tl.plots.image_grid import prediction_grid
from cifar10_tl.plots.per_class import class_bars

if TYPE_CHECKING:
    from torch import Tensor

    from cifar10_tl.data.batch import Split
    from cifar10_tl.metrics.evaluation import Evaluation


def evaluation_figures(evaluation: Evaluation, calibrated: Evaluation, split: Split, where: str) -> dict[str, Figure]:
    """Draw all figures of an evaluation of the images in ``split``.

    ``calibrated`` has the temperature-scaled probabilities; ``where`` ends the headings: "validation, epoch 3".
    """
    correct = (evaluation.predictions == evaluation.labels).numpy()
    rows = evaluation.per_class()
    precision, recall, f1 = (np.array([row[key] for row in rows]) for key in ("precision", "recall", "f1"))
    return {
        "confusion_matrix": confusion_matrix_figure(evaluation, where),
        "correct": correct_figure(evaluation, split, where),
        "incorrect": incorrect_figure(evaluation, split, where),
        "reliability": _reliability_figure(evaluation, calibrated, where),
        "per_class": class_bars(precision, recall, f1, evaluation.class_names, heading=f"Per class, {where}"),
        "confidence": confidence_histogram(
            evaluation.probabilities.max(1).values.numpy(), correct, heading=f"Confidence, {where}"
        ),
    }


def confusion_matrix_figure(evaluation: Evaluation, where: str) -> Figure:
    """Draw the confusion matrix of an evaluation."""
    counts = evaluation.confusion_matrix.numpy()
    return confusion_matrix(counts, evaluation.class_names, heading=f"Confusion matrix, {where}")


def correct_figure(evaluation: Evaluation, split: Split, where: str, num_images: int = 25) -> Figure:
    """Draw up to ``num_images`` correct predictions, spread evenly over the split."""
    return _prediction_figure(evaluation, split, evaluation.correct(num_images), f"Correct predictions, {where}")


def incorrect_figure(evaluation: Evaluation, split: Split, where: str, num_images: int = 25) -> Figure:
    """Draw up to ``num_images`` incorrect predictions, the most confident first."""
    rows = evaluation.incorrect(num_images)
    return _prediction_figure(evaluation, split, rows, f"Incorrect predictions, the most confident first, {where}")


def _prediction_figure(evaluation: Evaluation, split: Split, rows: Tensor, heading: str) -> Figure:
    return prediction_grid(
        split.by_index(evaluation.indices[rows]).permute(0, 2, 3, 1).numpy(),
        evaluation.labels[rows].numpy(),
        evaluation.predictions[rows].numpy(),
        evaluation.probabilities[rows].numpy(),
        evaluation.class_names,
        heading=heading,
    )


def _reliability_figure(evaluation: Evaluation, calibrated: Evaluation, where: str) -> Figure:
    panels = {}
    for title, scored in (("uncalibrated", evaluation), ("temperature-scaled (val)", calibrated)):
        bins = scored.reliability_bins()
        arrays = (bins.counts.numpy(), bins.confidence.numpy(), bins.accuracy.numpy())
        panels[f"{title}: ECE {scored.calibration()['ece']:.2%}"] = arrays
    note = f"blue: accuracy    orange: mean confidence    {len(bins.counts)} bins    ECE: expected calibration error"
    return reliability_diagram(panels, heading=f"Reliability, {where}", note=note)
