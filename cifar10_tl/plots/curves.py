"""Curves of accuracy and loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cifar10_tl.plots import style

Rows = Sequence[Mapping[str, float | None]]
Floats = NDArray[np.float64]


@style.default_style
def curves(rows: Rows, *, heading: str, best: float | None = None, monitor: str = "val/acc") -> Figure:
    """Plot accuracy and loss against the epoch, training and validation together.

    Args:
        rows: One mapping per epoch, with ``epoch``, ``train/acc``, ``val/acc``, ``train/loss`` and ``val/loss``; values
            that are missing or not finite are left out.
        heading: Heading of the figure.
        best: Epoch to mark as the best one.
        monitor: Metric by which it is the best.
    """
    note, name = "", monitor.replace("/", " ").replace("_", " ").replace("acc", "accuracy")
    for row in (row for row in rows if row["epoch"] == best):
        note = f"☆ best {name} {row[monitor]:{'.4f' if monitor.endswith('loss') else '.2%'}} at epoch {best:g}"
    fig, page = style.new_page(10, 3.5, heading, note)
    for left, metric, title in ((0.75, "acc", "accuracy"), (5.8, "loss", "loss")):
        panel = style.add_panel(page, left, 0.25, 4, 2.7, ("epoch", "", title))
        _scale_panel(panel, np.array([row["epoch"] for row in rows]), metric)
        _draw_series(panel, rows, metric, best)
    return fig


def _points(rows: Rows, key: str) -> Floats:
    """Return epochs and values of a curve, [2, N], without the epochs that have no value."""
    found = [(row["epoch"], v) for row in rows if (v := row.get(key)) is not None and math.isfinite(v)]
    return np.array(found, dtype=np.float64).reshape(-1, 2).T


def _draw_series(panel: Axes, rows: Rows, metric: str, best: float | None) -> None:
    """Draw both curves, which differ in color, dashes and markers, with a star at the best epoch."""
    series = (("train", style.BLUE, "--", "o", 6), ("val", style.ORANGE, "-", "s", 4))  # sizes: equal values both show
    for split, color, dashes, marker, size in series:
        x, y = _points(rows, f"{split}/{metric}")
        if len(x):
            shape = marker if len(x) <= style.MARKER_LIMIT else ""
            panel.plot(x, y, dashes, color=color, marker=shape, markersize=size, linewidth=1.6, label=split)
        if split == "val" and best is not None and best in x:
            panel.plot(best, y[x == best][0], "*", color=style.INK, fillstyle="none", markersize=14, zorder=5)
    if not panel.lines:
        panel.set_yticks([])
        panel.grid(visible=False)
        style.write(panel, 0.5, 0.5, "no values", style.BODY, ha="center", color=style.MUTED, transform=panel.transAxes)
        return
    if metric == "acc":
        style.scale_accuracy(panel)
    style.add_legend(panel)


def _scale_panel(panel: Axes, epochs: Floats, metric: str) -> None:
    margin = max(0.3, 0.02 * float(np.ptp(epochs)))  # centers a single epoch
    panel.set_xlim(float(epochs.min()) - margin, float(epochs.max()) + margin)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%" if metric == "acc" else f"{y:g}")
