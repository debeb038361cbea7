"""Figures of an evaluation, drawn by the training callbacks and by the evaluate command."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cifar10_tl.plots import style
from cifar10_tl.plots.confusion_matrix import confusion_matrix
from cifar10_tl.plots.image_grid import caption_grid

if TYPE_CHECKING:
    from torch import Tensor

    from cifar10_tl.data.batch import Split
    from cifar10_tl.metrics.evaluation import Evaluation

_ROW, _BAR, _LIMIT = 0.27, 5.0, 40  # inches of a row and of a full bar, number of rows of class_bars


def evaluation_figures(
    evaluation: Evaluation, calibrated: Evaluation | None, split: Split, where: str
) -> dict[str, Figure]:
    """Draw all figures of an evaluation of the images in ``split``.

    ``calibrated`` has the temperature-scaled probabilities; ``where`` ends the headings: "validation, epoch 3".
    """
    correct = (evaluation.predictions == evaluation.labels).numpy()
    confidence = evaluation.probabilities.max(1).values.numpy()
    panels = {
        f"{title}: ECE {scored.calibration()['ece']:.2%}": scored.reliability_bins()
        for title, scored in (("uncalibrated", evaluation), ("temperature-scaled (val)", calibrated))
        if scored
    }
    return {
        "confusion_matrix": confusion_matrix_figure(evaluation, where),
        "correct": correct_figure(evaluation, split, where),
        "incorrect": incorrect_figure(evaluation, split, where),
        "reliability": reliability_diagram(panels, heading=f"Reliability, {where}"),
        "per_class": class_bars(evaluation.per_class(), heading=f"Per class, {where}"),
        "confidence": confidence_histogram(confidence, correct, heading=f"Confidence, {where}"),
    }


def confusion_matrix_figure(evaluation: Evaluation, where: str) -> Figure:
    """Draw the confusion matrix of an evaluation."""
    counts = evaluation.confusion_matrix.numpy()
    return confusion_matrix(counts, evaluation.class_names, heading=f"Confusion matrix, {where}")


def correct_figure(evaluation: Evaluation, split: Split, where: str, num_images: int = 25) -> Figure:
    """Draw up to ``num_images`` correct predictions, spread evenly over the split."""
    return _prediction_grid(evaluation, split, evaluation.correct(num_images), f"Correct predictions, {where}")


def incorrect_figure(evaluation: Evaluation, split: Split, where: str, num_images: int = 25) -> Figure:
    """Draw up to ``num_images`` incorrect predictions, the most confident first."""
    rows = evaluation.incorrect(num_images)
    return _prediction_grid(evaluation, split, rows, f"Incorrect predictions, the most confident first, {where}")


@style.default_style
def _prediction_grid(evaluation: Evaluation, split: Split, rows: Tensor, heading: str) -> Figure:
    """Draw images with the predicted class and, where it is incorrect, the true class."""
    if not len(rows):
        return style.new_page(style.MIN_WIDTH, 0, heading, "no such predictions")[0]
    names, captions = style.legible(evaluation.class_names), []
    for row in rows.tolist():
        label, predicted = int(evaluation.labels[row]), int(evaluation.predictions[row])
        percent = [f" {style.as_percent(p)}" for p in evaluation.probabilities[row].tolist()]
        if label == predicted:
            captions.append([("✓ ", names[predicted], percent[predicted], style.BLUE)])
        else:
            true = ("true: ", names[label], percent[label], style.INK)
            captions.append([("✗ ", names[predicted], percent[predicted], style.ORANGE), true])
    images = split.by_index(evaluation.indices[rows]).permute(0, 2, 3, 1).numpy()
    note = "✓ correct    ✗ incorrect    % = probability of that class"
    return caption_grid(images, captions, heading=heading, note=note, side=1.28, frame=0.04)


@style.default_style
def reliability_diagram(panels: Mapping[str, Sequence[Any]], *, heading: str) -> Figure:
    """Draw accuracy against confidence, with one panel per set of probabilities.

    ``panels`` maps a title to the counts, mean confidence and accuracy of bins of equal width over [0, 1].
    """
    side, step, num_bins = 3.0, 3.95, len(next(iter(panels.values()))[0])
    note = f"blue: accuracy    orange: mean confidence    {num_bins} bins    ECE: expected calibration error"
    fig, page = style.new_page(style.PAD + step * len(panels), side + 0.8, heading, note)
    for k, (title, bins) in enumerate(panels.items()):
        counts, confidence, accuracy = map(np.asarray, bins)
        left = style.PAD + 0.6 + k * step
        panel = style.add_panel(page, left, 0.25, side, side, ("confidence", "accuracy", title))
        filled = np.flatnonzero(counts)
        middle, reach = (filled + 0.5) / num_bins, 0.44 / num_bins
        panel.plot([0, 1], [0, 1], "--", color=style.MUTED, linewidth=1)
        panel.bar(middle, accuracy[filled], 2 * reach, color=style.BLUE, zorder=2)
        marks: dict[str, Any] = {"color": style.ORANGE, "linewidth": 2.2, "zorder": 3}
        panel.hlines(confidence[filled], middle - reach, middle + reach, **marks)
        panel.set(xlim=(0, 1), ylim=(0, 1))
        panel.xaxis.set_major_formatter("{x:.0%}")
        panel.yaxis.set_major_formatter("{x:.0%}")
    return fig


@style.default_style
def confidence_histogram(
    confidence: NDArray[np.floating[Any]], correct: NDArray[np.bool_], *, heading: str, num_bins: int = 25
) -> Figure:
    """Draw histograms of the confidence ``[N]`` of correct and of incorrect predictions; N may be 0."""
    width, height, step, left = 6.0, 1.5, 2.15, style.PAD + 0.65
    fig, page = style.new_page(width + 0.75 + 2 * style.PAD, 2 * step + 0.25, heading)
    rows = (("✓ correct", correct, style.BLUE), ("✗ incorrect", ~correct, style.ORANGE))
    for k, (name, selected, color) in enumerate(rows):
        values = confidence[selected]
        mean = f", mean confidence {values.mean():.1%}" if len(values) else ""
        style.write(page, left, k * step + 0.1, f"{name}: {len(values):,} images{mean}", style.BODY, weight="bold")
        panel = style.add_panel(page, left, k * step + 0.25, width, height, ("confidence" if k else "", "images"))
        panel.hist(values, num_bins, range=(0, 1), color=color, rwidth=0.88)
        panel.set_xlim(0, 1)
        panel.set_ylim(bottom=0, top=None if len(values) else 1)
        panel.xaxis.set_major_formatter("{x:.0%}")
        panel.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return fig


@style.default_style
def class_bars(rows: Sequence[Mapping[str, Any]], *, heading: str) -> Figure:
    """Draw one bar per class for its ``f1``, with marks for ``precision`` and ``recall``.

    Classes without images are left out. Of more than 40 classes, those with the lowest F1 are drawn.
    """
    rows = [row for row in rows if not math.isnan(row["recall"])]
    class_names = style.legible([row["class"] for row in rows])
    precision, recall, f1 = (np.array([row[key] for row in rows]) for key in ("precision", "recall", "f1"))
    order = np.arange(len(f1)) if len(f1) <= _LIMIT else np.argsort(f1, kind="stable")[:_LIMIT]
    note = "bar and number: F1    ◂ precision    ▸ recall"
    if len(f1) > _LIMIT:
        note += f"    (the {_LIMIT} classes of {len(f1)} with the lowest F1)"
    name_width = min(max(style.text_width(style.clean(class_names[i]), style.BODY) for i in order), 1.8) + 0.02
    left, height = style.PAD + name_width + 0.1, _ROW * len(order)
    fig, page = style.new_page(left + _BAR + 0.85, height + 0.35, heading, note)
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        page.vlines(left + fraction * _BAR, 0, height, color=style.LINE, linewidth=0.6, zorder=0)
        style.write(page, left + fraction * _BAR, height + 0.12, f"{fraction:.0%}", ha="center", color=style.MUTED)
    middles = (np.arange(len(order)) + 0.5) * _ROW
    page.barh(middles, f1[order] * _BAR, 0.7 * _ROW, left=left, color=style.BLUE, alpha=0.35)
    # Above and below the middle, so that equal values do not cover each other.
    for values, y, color, marker in ((precision, -0.05, style.INK, "<"), (recall, 0.05, style.ORANGE, ">")):
        page.scatter(left + values[order] * _BAR, middles + y, 22, color, marker=marker, zorder=3, linewidths=0)
    for middle, i in zip(middles, order, strict=True):
        name = style.fit(class_names[i], name_width, style.BODY)
        style.write(page, left - 0.08, middle, name, style.BODY, ha="right")
        style.write(page, left + _BAR + 0.2, middle, style.as_percent(float(f1[i])))
    return fig
