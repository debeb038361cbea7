"""Whether the network's confidence can be trusted: reliability diagram, and confidence of right and wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cifar10_tl.plots.style import (
    BLUE,
    BODY,
    MIN_WIDTH,
    MUTED,
    ORANGE,
    PAD,
    add_panel,
    default_style,
    in_percent,
    label_axes,
    new_page,
    write,
)

Floats = NDArray[np.floating[Any]]


_SIDE = 3.0  # inches, of a reliability diagram


@default_style()
def reliability_diagram(
    bins: Mapping[str, tuple[NDArray[np.integer[Any]], Floats, Floats]], *, heading: str, note: str
) -> Figure:
    """Draw accuracy against confidence, a panel for each set of probabilities.

    A bar is as high as the predictions of its bin are right; its mark sits where the mean confidence says it should
    end. Under the diagonal the network is too sure of itself.

    Args:
        bins: For the title of each panel counts ``[B]``, mean confidence ``[B]`` and accuracy ``[B]`` of bins of
            equal width over [0, 1]; an empty bin may hold NaN.
        heading: Text above the panels.
        note: Below the heading.
    """
    step = _SIDE + 0.95
    fig, page = new_page(PAD + step * len(bins), _SIDE + 0.8, heading, note)
    for k, (title, (counts, confidence, accuracy)) in enumerate(bins.items()):
        left = PAD + 0.6 + k * step
        write(page, left, 0.1, title, BODY + 1, weight="bold")
        panel = add_panel(fig, page, left, 0.25, _SIDE, _SIDE)
        _draw_bins(panel, np.asarray(counts), np.asarray(confidence), np.asarray(accuracy))
    return fig


def _draw_bins(panel: Axes, counts: NDArray[Any], confidence: Floats, accuracy: Floats) -> None:
    there = np.flatnonzero(counts)
    width = 1 / len(counts)
    middle = (there + 0.5) * width
    panel.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
    panel.bar(middle, accuracy[there], 0.88 * width, color=BLUE, zorder=2)
    panel.hlines(confidence[there], middle - 0.44 * width, middle + 0.44 * width, color=ORANGE, linewidth=2.2, zorder=3)
    panel.set(xlim=(0, 1), ylim=(0, 1))
    panel.xaxis.set_major_formatter(in_percent)
    panel.yaxis.set_major_formatter(in_percent)
    label_axes(panel, "confidence", "accuracy")


@default_style()
def confidence_histogram(confidence: Floats, right: NDArray[np.bool_], *, heading: str, num_bins: int = 25) -> Figure:
    """Draw how sure the network was, of its right and of its wrong predictions, each on a scale of its own.

    Args:
        confidence: Probability of the predicted class, ``[N]``; N may be 0.
        right: Whether the prediction is right, ``[N]``.
        heading: Text above the panels.
        num_bins: Bars over [0, 1].

    Raises:
        ValueError: If the lengths differ.
    """
    confidence, right = np.asarray(confidence), np.asarray(right, dtype=bool)
    if confidence.shape != right.shape:
        raise ValueError(f"confidence has shape {confidence.shape}, right has {right.shape}")
    if not len(confidence):
        return new_page(MIN_WIDTH, 0, heading, "no images counted")[0]
    width, height, step = 6.0, 1.5, 2.15
    fig, page = new_page(width + 0.75 + 2 * PAD, 2 * step + 0.25, heading)
    for k, (name, chosen, colour) in enumerate((("✓ right", right, BLUE), ("✗ wrong", ~right, ORANGE))):
        values = confidence[chosen]
        mean = f", mean confidence {values.mean():.1%}" if len(values) else ""
        write(page, PAD + 0.65, k * step + 0.1, f"{name}: {len(values):,} images{mean}", BODY, weight="bold")
        panel = add_panel(fig, page, PAD + 0.65, k * step + 0.25, width, height)
        panel.hist(values, num_bins, range=(0, 1), color=colour, rwidth=0.88)
        panel.set_xlim(0, 1)
        panel.set_ylim(bottom=0, top=None if len(values) else 1)
        panel.xaxis.set_major_formatter(in_percent)
        panel.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        label_axes(panel, "confidence" if k else "", "images")
    return fig
