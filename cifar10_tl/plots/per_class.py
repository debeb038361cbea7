"""How well each class is told from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cifar10_tl.plots.style import (
    BLUE,
    BODY,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAD,
    SMALL,
    as_percent,
    clean,
    default_style,
    fit,
    legible,
    new_page,
    text_width,
    write,
)

Floats = NDArray[np.floating[Any]]


_ROW, _BAR, _MOST = 0.27, 5.0, 40  # inches of a row and of a full bar; classes that are shown


@default_style()
def class_bars(precision: Floats, recall: Floats, f1: Floats, class_names: Sequence[str], *, heading: str) -> Figure:
    """Draw a bar a class, as long as its F1, with marks for precision and recall.

    Of more than 40 classes, the 40 with the lowest F1 are shown, the lowest first.

    Args:
        precision: ``[K]`` in [0, 1], K >= 1.
        recall: ``[K]`` in [0, 1].
        f1: ``[K]`` in [0, 1].
        class_names: K names; a long one is shortened with an ellipsis.
        heading: Text above the bars.

    Raises:
        ValueError: If the lengths differ.
    """
    if not len(precision) == len(recall) == len(f1) == len(class_names):
        raise ValueError(f"{len(precision)}, {len(recall)} and {len(f1)} values for {len(class_names)} classes")
    class_names = legible(class_names)
    order = np.arange(len(f1)) if len(f1) <= _MOST else np.argsort(f1, kind="stable")[:_MOST]
    note = "bar and number: F1    ◂ precision    ▸ recall"
    if len(f1) > _MOST:
        note += f"    (the {_MOST} classes of {len(f1)} with the lowest F1)"
    room = min(max(text_width(clean(class_names[i]), BODY) for i in order), 1.8) + 0.02
    left = PAD + room + 0.1
    height = _ROW * len(order)
    fig, page = new_page(left + _BAR + 0.85, height + 0.35, heading, note)
    for share in (0, 0.25, 0.5, 0.75, 1):
        page.vlines(left + share * _BAR, 0, height, color=LINE, linewidth=0.6, zorder=0)
        write(page, left + share * _BAR, height + 0.12, f"{share:.0%}", ha="center", color=MUTED)
    middles = (np.arange(len(order)) + 0.5) * _ROW
    page.barh(middles, np.asarray(f1)[order] * _BAR, 0.7 * _ROW, left=left, color=BLUE, alpha=0.35)
    # the marks keep to the upper and the lower half of the bar: equal values do not cover each other
    page.scatter(
        left + np.asarray(precision)[order] * _BAR, middles - 0.05, 22, INK, marker="<", zorder=3, linewidths=0
    )
    page.scatter(
        left + np.asarray(recall)[order] * _BAR, middles + 0.05, 22, ORANGE, marker=">", zorder=3, linewidths=0
    )
    for middle, i in zip(middles, order, strict=True):
        write(page, left - 0.08, middle, fit(class_names[i], room, BODY), BODY, ha="right")
        write(page, left + _BAR + 0.2, middle, as_percent(float(f1[i])), SMALL)
    return fig
