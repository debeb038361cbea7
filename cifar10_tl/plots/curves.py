"""Curves of accuracy and loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cifar10_tl.plots.style import (
    BLUE,
    BODY,
    FONT,
    INK,
    MIN_WIDTH,
    MUTED,
    ORANGE,
    SMALL,
    add_panel,
    default_style,
    label_axes,
    new_page,
    write,
)

MetricsLogger = Mapping[str, Sequence[float | None]] | Sequence[Mapping[str, float | None]]


_MARKERS_UP_TO = 30  # points in a curve


@default_style()
def curves(history: MetricsLogger, *, heading: str) -> Figure:
    """Plot accuracy and loss against the epoch, training and validation together.

    Args:
        history: One mapping an epoch, or one mapping of columns, with the keys ``epoch`` (0-based, as in
            TensorBoard), ``train/acc``, ``val/acc`` (in [0, 1]), ``train/loss`` and ``val/loss``. All but
            ``epoch`` may be missing, None, NaN or infinite; such points are left out.
        heading: Text above the panels.

    Raises:
        ValueError: If a row has no epoch or the columns differ in length.
    """
    epochs = _column(history, "epoch")
    if not np.isfinite(epochs).all():
        raise ValueError("every row of the history needs an 'epoch'")
    if not len(epochs):
        return new_page(MIN_WIDTH, 0, heading, "no epochs yet")[0]
    at, accuracies = _points(history, "val/acc")
    best = float(at[accuracies.argmax()]) if len(at) else None
    note = "" if best is None else f"☆ best val accuracy {accuracies.max():.2%} at epoch {best:g}"
    fig, page = new_page(10, 3.5, heading, note)
    for left, metric, title in ((0.75, "acc", "accuracy"), (5.8, "loss", "loss")):
        write(page, left, 0.1, title, BODY + 1, weight="bold")
        panel = add_panel(fig, page, left, 0.25, 4, 2.7)
        _style_panel(panel, epochs, metric)
        _draw_series(panel, history, metric, best)
    return fig


def _column(history: MetricsLogger, key: str) -> NDArray[np.float64]:
    """One column of the history, NaN where a value is missing."""
    values = history.get(key, ()) if isinstance(history, Mapping) else [row.get(key) for row in history]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _points(history: MetricsLogger, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs and values of one curve; epochs without a value are left out, so the line runs across them."""
    epochs, values = _column(history, "epoch"), _column(history, key)
    if isinstance(history, Mapping) and key not in history:
        return values, values
    if len(values) != len(epochs):
        raise ValueError(f"{key!r} has {len(values)} values for {len(epochs)} epochs")
    finite = np.isfinite(values)
    return epochs[finite], values[finite]


def _draw_series(panel: Axes, history: MetricsLogger, metric: str, best: float | None) -> None:
    """Draw both curves, apart by colour, dashes and markers, with a star at the best validation epoch."""
    styles = (("train", BLUE, "--", "o", 6), ("val", ORANGE, "-", "s", 4))  # equal values: both are seen
    for split, colour, dashes, marker, size in styles:
        x, y = _points(history, f"{split}/{metric}")
        if len(x):
            shape = marker if len(x) <= _MARKERS_UP_TO else ""
            panel.plot(x, y, dashes, color=colour, marker=shape, markersize=size, linewidth=1.6, label=split)
        if split == "val" and best is not None and best in x:
            panel.plot(best, y[x == best][0], "*", color=INK, fillstyle="none", markersize=14, zorder=5)
    if not panel.lines:
        panel.set_yticks([])
        panel.grid(visible=False)
        write(panel, 0.5, 0.5, "no values", BODY, ha="center", color=MUTED, transform=panel.transAxes)
        return
    if metric == "acc":  # no ticks beyond 100 %, none a thousandth of a percent apart
        low, high = panel.get_ylim()
        spare = max(0.0, 0.01 - (high - low)) / 2
        margin = 0.04 * (high - low + 2 * spare)
        panel.set_ylim(max(low - spare, -margin), min(high + spare, 1 + margin))
    style: dict[str, Any] = {"prop": FontProperties(family=FONT, size=SMALL), "labelcolor": INK}
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0, **style)


def _style_panel(panel: Axes, epochs: NDArray[np.float64], metric: str) -> None:
    margin = max(0.3, 0.02 * float(np.ptp(epochs)))  # a single epoch stands in the middle
    panel.set_xlim(float(epochs.min()) - margin, float(epochs.max()) + margin)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%" if metric == "acc" else f"{y:g}")
    label_axes(panel, "epoch")
