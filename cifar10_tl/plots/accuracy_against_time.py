"""Accuracy of several recipes against the time that they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from cifar10_tl.plots import style

_HEIGHT, _PANEL = 4.0, 3.1  # inches of a panel with and without its title and ticks


class Point(NamedTuple):
    """A recipe with its time and its accuracy, which is between ``low`` and ``high``."""

    name: str
    minutes: float
    accuracy: float
    low: float
    high: float


@style.default_style
def accuracy_against_time(panels: Mapping[str, Sequence[Point]]) -> Figure:
    """Plot one panel for each set of test images, with numbered points and bars from the low to the high accuracy."""
    height = _HEIGHT * len(panels)
    fig, page = style.new_page(9, height, "Test accuracy against training time", "bars: 95 % intervals")
    for number, (title, points) in enumerate(panels.items()):
        top = _HEIGHT * number
        style.write(page, 0.8, top + 0.1, title, style.BODY + 1, weight="bold")
        panel = style.add_panel(page, 0.8, top + 0.25, 4.2, _PANEL, ("minutes of training and validation", ""))
        _draw(panel, points)
        step = min(0.2, _PANEL / len(points))
        for i, point in enumerate(points):
            style.write(page, 5.2, top + 0.35 + i * step, style.fit(f"{i + 1} {point.name}", 3.6))
    return fig


def _draw(panel: Axes, points: Sequence[Point]) -> None:
    for i, (_, minutes, accuracy, low, high) in enumerate(points):
        bar = [[accuracy - low], [high - accuracy]]
        panel.errorbar(minutes, accuracy, bar, fmt="o", color=style.BLUE, capsize=3, markersize=4, linewidth=1)
        font: dict[str, Any] = {"family": style.FONT, "fontsize": style.TINY + 1, "ha": ("left", "right")[i % 2]}
        panel.annotate(str(i + 1), (minutes, accuracy), (4 - 8 * (i % 2), 2), textcoords="offset points", **font)
    panel.set_xscale("log")
    panel.margins(x=0.1, y=0.1)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter(PercentFormatter(1))
