"""Norms of the gradients against the epoch and the time step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from cifar10_tl.plots import style


@style.default_style
def gradient_flow(rows: Sequence[Mapping[str, Any]], *, heading: str) -> Figure:
    """Plot the norm of the gradient in each stage and, if there are any, at the time steps of an LSTM.

    A row has the keys ``epoch``, ``stages`` (norm by name, from the input to the output) and ``time_steps`` (list).
    """
    has_steps = any(row["time_steps"] for row in rows)
    note = "mean norm before clipping, on a logarithmic scale"
    fig, page = style.new_page(10 if has_steps else 5.6, 3.5, heading, note)
    panel = style.add_panel(page, 0.75, 0.25, 3.6, 2.7, ("epoch", "", "stages"))
    names = list(rows[-1]["stages"])
    for name, color in zip(names, mpl.colormaps["viridis"](np.linspace(0, 0.9, len(names))), strict=True):
        points = [(row["epoch"], row["stages"][name]) for row in rows if name in row["stages"]]
        _draw_line(panel, points, name, color)
    _finish(panel)
    if has_steps:
        panel = style.add_panel(page, 6, 0.25, 2.85, 2.7, ("time step", "", "input of the LSTM"))
        ends = {row["epoch"]: row["time_steps"] for row in (rows[0], rows[-1])}
        for (epoch, norms), color in zip(ends.items(), (style.BLUE, style.ORANGE), strict=False):
            _draw_line(panel, list(enumerate(norms, 1)), f"epoch {epoch}", color)
        _finish(panel)
    return fig


def _draw_line(panel: Axes, points: Sequence[tuple[float, float]], label: str, color: Any) -> None:
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    marker = "o" if len(points) <= style.MARKER_LIMIT else ""
    panel.semilogy(x, y, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)


def _finish(panel: Axes) -> None:
    low, high = panel.get_ylim()
    if high < 2.6 * low:  # could contain none of the ticks 1, 2, 5, 10
        panel.set_ylim(low / 1.6, high * 1.6)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    style.add_legend(panel, loc="center left", bbox_to_anchor=(1.02, 0.5), ncols=1, reverse=True)
