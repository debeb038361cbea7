"""Confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cifar10_tl.plots import style

_NUMBERED_LIMIT = 16  # classes; with more, the cells are too small for numbers
_PAIR_LIMIT, _LIST_WIDTH = 25, 3.8  # pairs of classes; inches


@style.default_style
def confusion_matrix(counts: NDArray[np.integer[Any]], class_names: Sequence[str], *, heading: str) -> Figure:
    """Draw a confusion matrix, where ``counts[i][j]`` images of class i were predicted as j.

    Up to 16 classes, every cell has its count and row percentage; with more, the most confused pairs of classes are
    listed beside the matrix.
    """
    matrix = _Matrix(counts, style.legible(class_names))
    total, correct = int(counts.sum()), int(np.trace(counts))
    note = f"accuracy {correct / total:.2%} ({correct:,} of {total:,} images)" if total else "no images"
    width = matrix.x + matrix.side + 0.75 + (0 if matrix.numbered else _LIST_WIDTH + style.PAD)
    fig, page = style.new_page(width, matrix.side + matrix.label_height + 0.4, heading, note)
    matrix.draw_cells(page)
    matrix.draw_class_labels(page)
    if matrix.numbered:
        matrix.write_cells(page)
    else:
        matrix.list_confused_pairs(page)
    return fig


class _Matrix:
    """Matrix with positions and sizes in inches; its top is at 0 on the page."""

    def __init__(self, counts: NDArray[Any], names: Sequence[str]) -> None:
        self.counts, self.names, self.n = counts, names, len(names)
        self.fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # 0 in an empty row
        widest = max(style.text_width(style.clean(name), style.BODY) for name in names)
        self.numbered = self.n <= _NUMBERED_LIMIT
        if self.numbered:  # cells as wide as the labels if the page allows it
            self.cell, self.label_size = max(0.6, 2.4 / self.n, min(widest + 0.1, 8.5 / self.n)), style.BODY
        else:  # 6 inches for 20 classes, 10 for 100 and more
            self.cell = min(0.3, max(8 / self.n, min(0.1, 10 / self.n)))
            self.label_size = max(style.TINY, min(style.SMALL, 60 * self.cell))
        self.label_width = min(widest * self.label_size / style.BODY, 1.6) + 0.02
        self.rotated = self.label_width + 0.05 > self.cell  # the labels below the matrix
        self.label_height = self.label_width if self.rotated else 0.15
        self.x, self.side = style.PAD + 0.25 + self.label_width, self.n * self.cell

    def draw_cells(self, page: Axes) -> None:
        """Draw the cells and the color bar; the square-root scale makes 1% incorrect visible beside 99% correct."""
        draw = partial(page.imshow, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
        end, bar = self.x + self.side, self.x + self.side + 0.15
        draw(self.fractions, extent=(self.x, end, self.side, 0))
        draw(np.linspace(1, 0, 256)[:, None] ** 2, extent=(bar, bar + 0.12, self.side, 0))
        lines = np.array([*range(0, self.n, 1 if self.numbered else 10), self.n]) * self.cell
        page.hlines(lines, self.x, end, color=style.LINE, linewidth=0.6)
        page.vlines(self.x + lines, 0, self.side, color=style.LINE, linewidth=0.6)
        for percent in (0, 1, 5, 10, 25, 50, 75, 100):
            y = self.side * (1 - math.sqrt(percent / 100))
            style.write(page, bar + 0.17, y, f"{percent}%", 7, color=style.MUTED)
        style.write(page, bar, self.side + 0.17, "of row", 7, color=style.MUTED)

    def draw_class_labels(self, page: Axes) -> None:
        size, turn = self.label_size, 90 if self.rotated else 0
        step = math.ceil(1.2 * size / 72 / self.cell - 0.01)  # skips labels that would overlap
        for i in range(0, self.n, step):
            name, middle = style.fit(self.names[i], self.label_width, size), (i + 0.5) * self.cell
            style.write(page, self.x - 0.06, middle, name, size, ha="right")
            style.write(page, self.x + middle, self.side + 0.06, name, size, ha="center", va="top", rotation=turn)
        title: dict[str, Any] = {"ha": "center", "weight": "bold"}
        below = self.side + self.label_height + 0.2
        style.write(page, self.x + self.side / 2, below, "predicted class", style.BODY, **title)
        style.write(page, style.PAD + 0.07, self.side / 2, "true class", style.BODY, rotation=90, **title)

    def write_cells(self, page: Axes) -> None:
        """Write count and row percentage into each cell, with smaller counts if they have too many digits."""
        size = style.BODY * min(1, (self.cell - 0.04) / style.text_width(str(self.counts.max()), style.BODY, "bold"))
        for (i, j), count in np.ndenumerate(self.counts):
            x, y = self.x + (j + 0.5) * self.cell, (i + 0.5) * self.cell
            percent = style.as_percent(float(self.fractions[i, j])) if self.counts[i].any() else "n/a"
            ink = "white" if self.fractions[i, j] > 0.45 else style.INK if count else style.MUTED
            weight = "bold" if i == j and count else "normal"
            style.write(page, x, y - 0.09, str(count), size, ha="center", color=ink, weight=weight)
            style.write(page, x, y + 0.09, percent, 7, ha="center", color=ink)

    def list_confused_pairs(self, page: Axes) -> None:
        """List the largest cells off the diagonal, to the right of the color bar."""
        errors = self.counts * ~np.eye(self.n, dtype=bool)
        order = np.argsort(-errors, axis=None, kind="stable")[:_PAIR_LIMIT]
        pairs = [(i, j) for i, j in (divmod(int(k), self.n) for k in order) if errors[i, j]]
        left = self.x + self.side + 0.75
        title = "Most confused: true → predicted" if pairs else "No class is confused with another"
        style.write(page, left, 0.08, title, style.BODY, weight="bold")
        for k, (i, j) in enumerate(pairs):
            y, (true, predicted) = 0.3 + 0.2 * k, (style.fit(self.names[c], 1.25) for c in (i, j))
            fraction = style.as_percent(float(self.fractions[i, j]))
            style.write(page, left + 0.95, y, f"{true} → {predicted}")
            style.write(page, left + 0.85, y, f"{errors[i, j]} ({fraction})", ha="right")
