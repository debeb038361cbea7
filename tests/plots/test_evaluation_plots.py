"""The figures that only the evaluate command draws: as test_figures.py asks of the others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plots.test_plots import CIFAR10, HEADING, ODD, check_layout, long_names, no_trace, strings

from cifar10_tl.plots import class_bars, confidence_histogram, reliability_diagram

__all__ = ["no_trace"]  # a fixture for each test here too
RNG = np.random.default_rng(0)


def bins(empty: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = np.zeros(15, int) if empty else np.arange(15)
    middle = np.where(counts > 0, (np.arange(15) + 0.5) / 15, np.nan)
    return counts, middle, middle**1.3


def reliability(heading: str = HEADING) -> Figure:
    panels = {"as it is: ECE 12.34%": bins(), "at the temperature of val: ECE 12.34%": bins()}
    return reliability_diagram(panels, heading=heading, note="blue: accuracy    orange: mean confidence")


def bars(names: list[str]) -> Figure:
    return class_bars(*RNG.random((3, len(names))), names, heading=HEADING)


def confidence(right: int, wrong: int) -> Figure:
    values = RNG.random(right + wrong)
    return confidence_histogram(values, np.arange(right + wrong) < right, heading=HEADING)


LAYOUTS: dict[str, Callable[[], Figure]] = {
    "reliability": reliability,
    "reliability long": lambda: reliability("W" * 90),
    "reliability empty": lambda: reliability_diagram({"nothing": bins(empty=True)}, heading=HEADING, note="none"),
    "bars 1": lambda: bars(["cat"]),
    "bars 10": lambda: bars(CIFAR10),
    "bars odd": lambda: bars(ODD),
    "bars 100 long": lambda: bars(long_names(100)),
    "bars perfect": lambda: class_bars(*np.ones((3, 10)), CIFAR10, heading="Perfect"),
    **{f"confidence {r} {w}": lambda r=r, w=w: confidence(r, w) for r, w in ((0, 0), (1, 0), (0, 3), (10**6, 7))},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_text_is_cut_off_or_overlaps(name: str) -> None:
    fig = LAYOUTS[name]()
    FigureCanvasAgg(fig).draw()
    check_layout(fig)
    fig.set_dpi(120)
    check_layout(fig)


def test_a_reliability_diagram_has_a_bar_for_each_bin_with_images() -> None:
    panel = reliability().axes[1]
    _, middle, accuracy = bins()
    assert [bar.get_height() for bar in panel.patches] == pytest.approx(accuracy[1:].tolist())
    assert [bar.get_x() + bar.get_width() / 2 for bar in panel.patches] == pytest.approx(middle[1:].tolist())


def test_bars_are_as_long_as_f1_and_name_it() -> None:
    fig = class_bars(np.array([0.5, 1.0]), np.array([0.5, 0.8]), np.array([0.5, 0.889]), ["cat", "dog"], heading="Bars")
    short, long = fig.axes[0].patches
    assert long.get_width() / short.get_width() == pytest.approx(0.889 / 0.5)
    assert {"cat", "dog", "50.0%", "88.9%"} <= set(strings(fig))


def test_of_many_classes_the_lowest_are_shown() -> None:
    f1 = np.linspace(1, 0.5, 100)
    fig = class_bars(f1, f1, f1, [f"class {i}" for i in range(100)], heading="Bars")
    shown = [text for text in strings(fig) if text.startswith("class ")]
    assert shown == [f"class {i}" for i in range(99, 59, -1)]
    assert any("40 classes of 100 with the lowest F1" in text for text in strings(fig))
    with pytest.raises(ValueError, match="1, 1 and 1 values for 2 classes"):
        class_bars(f1[:1], f1[:1], f1[:1], ["cat", "dog"], heading="Bars")


def test_the_histogram_counts_right_and_wrong() -> None:
    values = np.array([0.1, 0.9, 0.91, 0.5])
    fig = confidence_histogram(values, np.array([True, True, True, False]), heading="Confidence", num_bins=2)
    assert [[bar.get_height() for bar in axes.patches] for axes in fig.axes[1:]] == [[1, 2], [0, 1]]
    assert "✓ right: 3 images, mean confidence 63.7%" in strings(fig)
    with pytest.raises(ValueError, match="right has"):
        confidence_histogram(values, np.array([True]), heading="Confidence")
