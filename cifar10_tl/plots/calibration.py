"""Calibration: reliability diagram, and confidence of correct and incorrect predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cifar10_tl.plots import style

_SIDE = 3.0  # inches of a reliability diagram


@style.default_style()
def reliability_diagram(bins: Mapping[str, Sequence[NDArray[Any]]], *, heading: str, note: str) -> Figure:
    """Draw accuracy against confidence, with one panel per set of probabilities.

    ``bins`` maps the title of a panel to the counts, mean confidence and accuracy of bins of equal width over [0, 1].
    The height of a bar is the accuracy of its predictions, and its mark is their mean confidence.
    """
    step = _SIDE + 0.95
    fig, page = style.new_page(style.PAD + step * len(bins), _SIDE + 0.8, heading, note)
    for k, (title, (counts, confidence, accuracy)) in enumerate(bins.items()):
        left = style.PAD + 0.6 + k * step
        style.write(page, left, 0.1, title, style.BODY + 1, weight="bold")
        panel = style.add_panel(fig, page, left, 0.25, _SIDE, _SIDE)
        filled, width = np.flatnonzero(counts), 1 / len(counts)
        middle, reach = (filled + 0.5) * width, 0.44 * width
        panel.plot([0, 1], [0, 1], "--", color=style.MUTED, linewidth=1)
        panel.bar(middle, accuracy[filled], 2 * reach, color=style.BLUE, zorder=2)
        marks: dict[str, Any] = {"color": style.ORANGE, "linewidth": 2.2, "zorder": 3}
        panel.hlines(confidence[filled], middle - reach, middle + reach, **marks)
        panel.set(xlim=(0, 1), ylim=(0, 1))
        panel.xaxis.set_major_formatter(style.in_percent)
        panel.yaxis.set_major_formatter(style.in_percent)
        style.label_axes(panel, "confidence", "accuracy")
    return fig


@style.default_style()
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
        panel = style.add_panel(fig, page, left, k * step + 0.25, width, height)
        panel.hist(values, num_bins, range=(0, 1), color=color, rwidth=0.88)
        panel.set_xlim(0, 1)
        panel.set_ylim(bottom=0, top=None if len(values) else 1)
        panel.xaxis.set_major_formatter(style.in_percent)
        panel.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        style.label_axes(panel, "confidence" if k else "", "images")
    return fig
