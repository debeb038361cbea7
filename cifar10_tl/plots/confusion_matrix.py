"""Confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cifar10_tl.plots import style

Array = NDArray[Any]

_NUMBERED_LIMIT = 16  # classes; with more, the cells are too small for numbers
_PAIR_LIMIT, _LIST_WIDTH = 25, 3.8  # pairs of classes; inches


@style.default_style()
def confusion_matrix(counts: NDArray[np.integer[Any]], class_names: Sequence[str], *, heading: str) -> Figure:
    """Draw a confusion matrix, where ``counts[i][j]`` images of class i were predicted as j.

    Up to 16 classes, every cell has its count and row percentage; with more, the most confused pairs of classes are
    listed beside the matrix.
    """
    class_names = style.legible(class_names)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # 0 in an empty row
    plan = _plan(class_names)
    page_width = plan.x + plan.side + 0.75 + (0 if plan.numbered else _LIST_WIDTH + style.PAD)
    total, correct = int(counts.sum()), int(np.trace(counts))
    accuracy = f"accuracy {correct / max(total, 1):.2%} ({correct:,} of {total:,} images)"
    height = plan.side + 0.4 + (plan.label_width if plan.rotated else 0.15)
    fig, page = style.new_page(page_width, height, heading, accuracy if total else "no images")
    _draw_cells(page, fractions, plan)
    _draw_class_labels(page, class_names, plan)
    if plan.numbered:
        _write_cells(page, counts, fractions, plan)
    else:
        _list_confused_pairs(page, counts, fractions, class_names, plan)
    return fig


class _Plan(NamedTuple):
    """Positions on the page in inches; the top of the matrix is at 0."""

    n: int
    x: float
    side: float
    cell: float
    label_size: float  # points
    label_width: float
    numbered: bool  # the cells
    rotated: bool  # the labels below the matrix


def _plan(names: Sequence[str]) -> _Plan:
    n = len(names)
    widest = max(style.text_width(style.clean(name), style.BODY) for name in names)
    numbered = n <= _NUMBERED_LIMIT
    if numbered:  # cells as wide as the labels if the page allows it
        cell, size = max(0.6, 2.4 / n, min(widest + 0.1, 8.5 / n)), style.BODY
    else:  # 6 inches for 20 classes, 10 for 100 and more
        cell = min(0.3, max(8 / n, min(0.1, 10 / n)))
        size = max(style.TINY, min(style.SMALL, 60 * cell))
    label_width = min(widest * size / style.BODY, 1.6) + 0.02
    x = style.PAD + 0.25 + label_width
    return _Plan(n, x, n * cell, cell, size, label_width, numbered, rotated=label_width + 0.05 > cell)


def _draw_cells(page: Axes, fractions: Array, plan: _Plan) -> None:
    """Draw the cells and the color bar; the square-root scale makes 1% incorrect visible beside 99% correct."""
    draw = partial(page.imshow, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    end, bar = plan.x + plan.side, plan.x + plan.side + 0.15
    draw(fractions, extent=(plan.x, end, plan.side, 0))
    draw(np.linspace(1, 0, 256)[:, None] ** 2, extent=(bar, bar + 0.12, plan.side, 0))
    lines = np.array([*range(0, plan.n, 1 if plan.numbered else 10), plan.n]) * plan.cell
    page.hlines(lines, plan.x, end, color=style.LINE, linewidth=0.6)
    page.vlines(plan.x + lines, 0, plan.side, color=style.LINE, linewidth=0.6)
    for percent in (0, 1, 5, 10, 25, 50, 75, 100):
        y = plan.side * (1 - math.sqrt(percent / 100))
        style.write(page, bar + 0.17, y, f"{percent}%", 7, color=style.MUTED)
    style.write(page, bar, plan.side + 0.17, "of row", 7, color=style.MUTED)


def _draw_class_labels(page: Axes, names: Sequence[str], plan: _Plan) -> None:
    size, turn = plan.label_size, 90 if plan.rotated else 0
    step = math.ceil(1.2 * size / 72 / plan.cell - 0.01)  # skips labels that would overlap
    for i in range(0, plan.n, step):
        name, middle = style.fit(names[i], plan.label_width, size), (i + 0.5) * plan.cell
        style.write(page, plan.x - 0.06, middle, name, size, ha="right")
        style.write(page, plan.x + middle, plan.side + 0.06, name, size, ha="center", va="top", rotation=turn)
    title: dict[str, Any] = {"ha": "center", "weight": "bold"}
    below = plan.side + 0.2 + (plan.label_width if plan.rotated else 0.15)
    style.write(page, plan.x + plan.side / 2, below, "predicted class", style.BODY, **title)
    style.write(page, style.PAD + 0.07, plan.side / 2, "true class", style.BODY, rotation=90, **title)


def _write_cells(page: Axes, counts: Array, fractions: Array, plan: _Plan) -> None:
    """Write count and row percentage into each cell, with smaller counts if they have too many digits."""
    size = style.BODY * min(1, (plan.cell - 0.04) / style.text_width(str(counts.max()), style.BODY, "bold"))
    for (i, j), count in np.ndenumerate(counts):
        x, y = plan.x + (j + 0.5) * plan.cell, (i + 0.5) * plan.cell
        percent = style.as_percent(float(fractions[i, j])) if counts[i].any() else "n/a"
        ink = "white" if fractions[i, j] > 0.45 else style.INK if count else style.MUTED
        weight = "bold" if i == j and count else "normal"
        style.write(page, x, y - 0.09, str(count), size, ha="center", color=ink, weight=weight)
        style.write(page, x, y + 0.09, percent, 7, ha="center", color=ink)


def _list_confused_pairs(page: Axes, counts: Array, fractions: Array, names: Sequence[str], plan: _Plan) -> None:
    """List the largest cells off the diagonal, to the right of the color bar."""
    errors = counts * ~np.eye(plan.n, dtype=bool)
    order = np.argsort(-errors, axis=None, kind="stable")[:_PAIR_LIMIT]
    pairs = [(i, j) for i, j in (divmod(int(k), plan.n) for k in order) if errors[i, j]]
    left = plan.x + plan.side + 0.75
    title = "Most confused: true → predicted" if pairs else "No class is confused with another"
    style.write(page, left, 0.08, title, style.BODY, weight="bold")
    for k, (i, j) in enumerate(pairs):
        y, (true, predicted) = 0.3 + 0.2 * k, (style.fit(names[c], 1.25, style.SMALL) for c in (i, j))
        style.write(page, left + 0.95, y, f"{true} → {predicted}")
        style.write(page, left + 0.85, y, f"{errors[i, j]} ({style.as_percent(float(fractions[i, j]))})", ha="right")
