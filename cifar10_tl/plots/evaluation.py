"""The figures that an evaluation leaves: those of training, and some of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cifar10_tl import plots
from cifar10_tl.callbacks import ConfusionMatrix, CorrectPredictions, IncorrectPredictions
from cifar10_tl.data.batch import Split
from cifar10_tl.io import atomic_write
from cifar10_tl.metrics.calibration import NUM_BINS, reliability_bins
from cifar10_tl.metrics.evaluation import Evaluation

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def write_figures(
    folder: Path, results: Mapping[str, Any], evaluation: Evaluation, calibrated: Evaluation, split: Split
) -> None:
    """Write the figures of training, and those of evaluation alone, as ``<folder>/<name>_<split>.png``."""
    where = f"{SPLIT_NAMES[results['split']]}, epoch {results['epoch']}"
    pages = {**figures_of_training(evaluation, split, where), **figures_of_evaluation(evaluation, calibrated, where)}
    if "corruption" in results:
        pages["corruption"] = figure_of_corruption(results["corruption"], where)
    for name, figure in pages.items():
        with atomic_write(folder / f"{name}_{results['split']}.png") as file:
            figure.savefig(file, format="png")


def figures_of_training(evaluation: Evaluation, split: Split, where: str) -> dict[str, Figure]:
    """The figures that a training run draws of its test."""
    drawn = (ConfusionMatrix(), CorrectPredictions(), IncorrectPredictions())
    return {c.tag: c.draw(evaluation, split, f"{c.title}, {where}") for c in drawn}


def figures_of_evaluation(evaluation: Evaluation, calibrated: Evaluation, where: str) -> dict[str, Figure]:
    """Reliability before and after the temperature, a bar a class, and the confidence of right and wrong."""
    bins = {}
    for title, e in (("as it is", evaluation), ("at the temperature of val", calibrated)):
        counts, confidence, accuracy = reliability_bins(e.probabilities, e.labels)
        key = f"{title}: ECE {e.calibration()['ece']:.2%}"
        bins[key] = (counts.numpy(), confidence.numpy(), accuracy.numpy())
    rows = evaluation.per_class()
    precision, recall, f1 = (np.array([row[key] for row in rows]) for key in ("precision", "recall", "f1"))
    right = (evaluation.predictions == evaluation.labels).numpy()
    return {
        "reliability": plots.reliability_diagram(
            bins,
            heading=f"Reliability, {where}",
            note=f"blue: accuracy    orange: mean confidence    {NUM_BINS} bins    ECE: expected calibration error",
        ),
        "per_class": plots.class_bars(precision, recall, f1, evaluation.class_names, heading=f"Per class, {where}"),
        "confidence": plots.confidence_histogram(
            evaluation.probabilities.max(1).values.numpy(), right, heading=f"Confidence, {where}"
        ),
    }


def figure_of_corruption(corruption: Mapping[str, Sequence[Mapping[str, Any]]], where: str) -> Figure:
    """Accuracy against severity."""
    accuracies = {kind: [row["acc"] for row in rows] for kind, rows in corruption.items()}
    note = "corruptions of our own, not those of CIFAR-10-C"
    return plots.corruption_curves(accuracies, heading=f"Accuracy on corrupted images, {where}", note=note)
