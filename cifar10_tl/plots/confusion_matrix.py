"""The confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cifar10_tl.plots.style import (
    BODY,
    INK,
    LINE,
    MUTED,
    PAD,
    SMALL,
    TINY,
    as_percent,
    clean,
    default_style,
    fit,
    legible,
    new_page,
    text_width,
    write,
)

_NUMBERED_UP_TO = 16  # classes; with more, the cells of a confusion matrix are too small for numbers


_LISTED_PAIRS, _LIST_WIDTH = 25, 3.8


@default_style()
def confusion_matrix(counts: NDArray[np.integer[Any]], class_names: Sequence[str], *, heading: str) -> Figure:
    """Draw a confusion matrix coloured by row percentage, with the overall accuracy under the heading.

    Up to 16 classes every cell shows its count and row percentage; with more, the most confused pairs are
    listed beside the matrix.

    Args:
        counts: int ``[K, K]``, ``counts[i][j]`` images of true class i predicted as class j; K >= 1.
        class_names: K names; a long one is shortened with an ellipsis.
        heading: Text above the matrix.

    Raises:
        ValueError: If counts is not a square matrix of non-negative integers with one name a class.
    """
    counts = np.asarray(counts)
    _check_counts(counts, len(class_names))
    class_names = legible(class_names)
    # An empty row is divided by 1, not by 0: its shares are 0 and numpy has nothing to warn about.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    plan = _plan_matrix(class_names)
    page_width = plan.x + plan.side + 0.75 + (0 if plan.numbered else _LIST_WIDTH + PAD)
    fig, page = new_page(page_width, plan.title_y + 0.2, heading, _accuracy_note(counts))
    _draw_cells(page, shares, plan)
    _draw_class_labels(page, class_names, plan)
    if plan.numbered:
        _write_cells(page, counts, shares, plan)
    else:
        _list_confused_pairs(page, counts, shares, class_names, plan)
    return fig


class _Plan(NamedTuple):
    """Where the parts of a confusion matrix lie on the page, in inches; its top edge is at 0."""

    n: int
    x: float
    side: float
    cell: float
    label_size: float  # points
    label_room: float
    rotated: bool  # the labels below the matrix

    @property
    def numbered(self) -> bool:
        return self.n <= _NUMBERED_UP_TO

    @property
    def title_y(self) -> float:
        """Middle of the title below the column labels."""
        return self.side + 0.2 + (self.label_room if self.rotated else 0.15)


def _plan_matrix(names: Sequence[str]) -> _Plan:
    n = len(names)
    widest = max(text_width(clean(name), BODY) for name in names)
    if n <= _NUMBERED_UP_TO:  # cells as wide as the labels where the page allows it
        cell, size = max(0.6, 2.4 / n, min(widest + 0.1, 8.5 / n)), BODY
    else:  # a matrix of 6 inches with 20 classes, of 10 with 100 or more
        cell = min(0.3, max(8 / n, min(0.1, 10 / n)))
        size = max(TINY, min(SMALL, 60 * cell))
    room = min(widest * size / BODY, 1.6) + 0.02
    return _Plan(n, PAD + 0.25 + room, n * cell, cell, size, room, rotated=room + 0.05 > cell)


def _check_counts(counts: NDArray[Any], n_names: int) -> None:
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"counts must be a square matrix, not of shape {counts.shape}")
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError("counts must be integers of at least 0")
    if n_names != len(counts):
        raise ValueError(f"class_names has {n_names} entries for {len(counts)} classes")


def _accuracy_note(counts: NDArray[Any]) -> str:
    total, right = int(counts.sum()), int(np.trace(counts))
    return f"accuracy {right / total:.2%} ({right:,} of {total:,} images)" if total else "no images counted"


def _draw_cells(page: Axes, shares: NDArray[Any], plan: _Plan) -> None:
    """Colour the cells, and a bar beside them; the square root makes 1 % wrong visible beside 99 % right."""
    style: dict[str, Any] = {"cmap": "Blues", "aspect": "auto", "interpolation": "nearest"}
    style["norm"] = PowerNorm(0.5, 0, 1)
    end, bar = plan.x + plan.side, plan.x + plan.side + 0.15
    page.imshow(shares, extent=(plan.x, end, plan.side, 0), **style)
    page.imshow(np.linspace(1, 0, 256)[:, None] ** 2, extent=(bar, bar + 0.12, plan.side, 0), **style)
    lines = np.array([*range(0, plan.n, 1 if plan.numbered else 10), plan.n]) * plan.cell
    page.hlines(lines, plan.x, end, color=LINE, linewidth=0.6)
    page.vlines(plan.x + lines, 0, plan.side, color=LINE, linewidth=0.6)
    for percent in (0, 1, 5, 10, 25, 50, 75, 100):
        y = plan.side * (1 - math.sqrt(percent / 100))
        write(page, bar + 0.17, y, f"{percent}%", 7, color=MUTED)
    write(page, bar, plan.side + 0.17, "of row", 7, color=MUTED)


def _draw_class_labels(page: Axes, names: Sequence[str], plan: _Plan) -> None:
    size, turn = plan.label_size, 90 if plan.rotated else 0
    step = math.ceil(1.2 * size / 72 / plan.cell - 0.01)  # not every label where the lines would touch
    for i in range(0, plan.n, step):
        name, middle = fit(names[i], plan.label_room, size), (i + 0.5) * plan.cell
        write(page, plan.x - 0.06, middle, name, size, ha="right")
        write(page, plan.x + middle, plan.side + 0.06, name, size, ha="center", va="top", rotation=turn)
    title: dict[str, Any] = {"ha": "center", "weight": "bold"}
    write(page, plan.x + plan.side / 2, plan.title_y, "predicted class", BODY, **title)
    write(page, PAD + 0.07, plan.side / 2, "true class", BODY, rotation=90, **title)


def _write_cells(page: Axes, counts: NDArray[Any], shares: NDArray[Any], plan: _Plan) -> None:
    """Write the count and the share of each cell, the count smaller where it has too many digits."""
    size = BODY * min(1, (plan.cell - 0.04) / text_width(str(counts.max()), BODY, "bold"))
    for (i, j), count in np.ndenumerate(counts):
        x, y = plan.x + (j + 0.5) * plan.cell, (i + 0.5) * plan.cell
        share = as_percent(float(shares[i, j])) if counts[i].any() else "n/a"
        ink = "white" if shares[i, j] > 0.45 else INK if count else MUTED
        weight = "bold" if i == j and count else "normal"
        write(page, x, y - 0.09, str(count), size, ha="center", color=ink, weight=weight)
        write(page, x, y + 0.09, share, 7, ha="center", color=ink)


def _list_confused_pairs(
    page: Axes, counts: NDArray[Any], shares: NDArray[Any], names: Sequence[str], plan: _Plan
) -> None:
    """List the largest cells off the diagonal, to the right of the colour bar."""
    wrong = counts * ~np.eye(plan.n, dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED_PAIRS]
    pairs = [(i, j) for i, j in (divmod(int(k), plan.n) for k in order) if wrong[i, j]]
    left = plan.x + plan.side + 0.75
    title = "Most confused: true → predicted" if pairs else "No class is taken for another"
    write(page, left, 0.08, title, BODY, weight="bold")
    for k, (i, j) in enumerate(pairs):
        y, pair = 0.3 + 0.2 * k, f"{fit(names[i], 1.25, SMALL)} → {fit(names[j], 1.25, SMALL)}"
        write(page, left + 0.95, y, pair)
        write(page, left + 0.85, y, f"{wrong[i, j]} ({as_percent(float(shares[i, j]))})", ha="right")
