"""Accuracy against the severity of what was done to the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator

from cifar10_tl.plots.style import BLUE, FONT, INK, ORANGE, PAD, SMALL, add_panel, in_percent, label_axes, new_page

#: Okabe and Ito's colours, each with a marker of its own.
_STYLES = ((BLUE, "o"), (ORANGE, "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"))


def corruption_curves(accuracies: Mapping[str, Sequence[float]], *, heading: str, note: str = "") -> Figure:
    """Plot accuracy against severity, a line for each corruption.

    Args:
        accuracies: For each corruption (5 at most) the accuracy in [0, 1] at severity 0 (unchanged), 1, 2, and so on.
        heading: Text above the panel.
        note: Below the heading.
    """
    fig, page = new_page(PAD + 0.65 + 5 + 1.35, 3.75, heading, note)
    panel = add_panel(fig, page, PAD + 0.65, 0.1, 5, 3.05)
    for (name, values), (colour, marker) in zip(accuracies.items(), _STYLES, strict=False):
        panel.plot(range(len(values)), values, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)
    low, high = panel.get_ylim()
    panel.set_ylim(max(low, -0.02), min(high, 1.02))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.yaxis.set_major_formatter(in_percent)
    label_axes(panel, "severity (0: unchanged)", "accuracy")
    style: dict[str, Any] = {"prop": FontProperties(family=FONT, size=SMALL), "labelcolor": INK}
    panel.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0, **style)
    return fig
