"""Precision, recall and F1 of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cifar10_tl.plots import style

Floats = NDArray[np.floating[Any]]

_ROW, _BAR, _LIMIT = 0.27, 5.0, 40  # inches of a row and of a full bar; classes that are shown


@style.default_style()
def class_bars(precision: Floats, recall: Floats, f1: Floats, class_names: Sequence[str], *, heading: str) -> Figure:
    """Draw one bar per class for its F1, with marks for precision and recall, all ``[K]``.

    Of more than 40 classes, those with the lowest F1 are drawn.
    """
    class_names = style.legible(class_names)
    order = np.arange(len(f1)) if len(f1) <= _LIMIT else np.argsort(f1, kind="stable")[:_LIMIT]
    note = "bar and number: F1    ◂ precision    ▸ recall"
    if len(f1) > _LIMIT:
        note += f"    (the {_LIMIT} classes of {len(f1)} with the lowest F1)"
    name_width = min(max(style.text_width(style.clean(class_names[i]), style.BODY) for i in order), 1.8) + 0.02
    left = style.PAD + name_width + 0.1
    height = _ROW * len(order)
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
        style.write(
            page, left - 0.08, middle, style.fit(class_names[i], name_width, style.BODY), style.BODY, ha="right"
        )
        style.write(page, left + _BAR + 0.2, middle, style.as_percent(float(f1[i])))
    return fig
