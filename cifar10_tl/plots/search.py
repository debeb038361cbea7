"""Figures of a search for settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cifar10_tl.plots import style

_ROW, _BAR = 0.27, 5.0  # inches of a row and of a full bar


@style.default_style
def search_history(accuracies: Mapping[int, float], pruned: Sequence[int], *, heading: str) -> Figure:
    """Plot val accuracies by trial number, and the best one so far; ``pruned`` trials were ended early."""
    finished = [number for number in accuracies if number not in pruned]
    best = max(finished, key=lambda number: accuracies[number])
    note = f"☆ best val accuracy {accuracies[best]:.2%} in trial {best}"
    fig, page = style.new_page(7, 3.5, heading, note)
    panel = style.add_panel(page, 0.8, 0.25, 5.95, 2.7, ("trial", "val accuracy"))
    panel.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    margin = max(0.3, 0.02 * max(accuracies))
    panel.set_xlim(-margin, max(accuracies) + margin)
    so_far = np.maximum.accumulate([accuracies[number] for number in finished])
    steps = ([*finished, max(accuracies)], [*so_far, so_far[-1]])
    panel.step(*steps, where="post", color=style.BLUE, linewidth=1.6, label="best so far")
    series = (("finished", finished, "o", style.BLUE), ("pruned", pruned, "x", style.ORANGE))
    for name, numbers, marker, color in series:
        if numbers:
            panel.plot(numbers, [accuracies[n] for n in numbers], marker, color=color, markersize=5, label=name)
    panel.plot(best, accuracies[best], "*", color=style.INK, fillstyle="none", markersize=14, zorder=5)
    style.scale_accuracy(panel)
    panel.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%")
    style.add_legend(panel)
    return fig


@style.default_style
def importance_bars(importance: Mapping[str, float], *, heading: str, note: str) -> Figure:
    """Draw one bar per setting for its importance; importances sum to 1."""
    width = min(max(style.text_width(style.clean(name), style.BODY) for name in importance), 2.5) + 0.02
    left, height = style.PAD + width + 0.1, _ROW * len(importance)
    fig, page = style.new_page(left + _BAR + 0.85, height, heading, note)
    middles = (np.arange(len(importance)) + 0.5) * _ROW
    scale = _BAR / max(importance.values())
    page.barh(middles, [scale * value for value in importance.values()], 0.7 * _ROW, left=left, color=style.BLUE)
    for middle, (name, value) in zip(middles, importance.items(), strict=True):
        style.write(page, left - 0.08, middle, style.fit(name, width, style.BODY), style.BODY, ha="right")
        style.write(page, left + scale * value + 0.08, middle, style.as_percent(value))
    return fig
