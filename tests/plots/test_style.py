from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from plots.figures import (
    CIFAR10,
    HEADING,
    ODD,
    evaluation,
    gradients,
    history,
    long_names,
    pictures,
    scored,
    shown,
    strings,
)

from cifar10_tl import plots
from cifar10_tl.data.batch import Split
from cifar10_tl.plots.confusion_matrix import confusion_matrix
from cifar10_tl.plots.evaluation import class_bars, confidence_histogram, reliability_diagram
from cifar10_tl.plots.style import as_percent, legible


def samples(n: int, names: list[str], height: int = 32, width: int = 32, heading: str = HEADING) -> Figure:
    titles = [[(name, " 9%")] for name in islice(cycle(names), n)]
    return plots.sample_grid(pictures(n, height, width), titles, heading=heading)


def predictions(n: int, names: list[str]) -> Figure:
    """n correct or incorrect predictions."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(names), 2 * n)
    result = evaluation(rng.dirichlet(np.full(len(names), 0.2), 2 * n), labels, names)
    split = Split(torch.tensor(pictures(2 * n)).permute(0, 3, 1, 2), torch.tensor(labels))
    return plots.incorrect_figure(result, split, HEADING, num_images=n)


def matrix(names: list[str], scale: int = 1) -> Figure:
    rng, k = np.random.default_rng(0), len(names)
    counts = rng.integers(0, 12, (k, k)) * (rng.random((k, k)) < 0.4)
    counts[np.diag_indices(k)] = 1000
    counts[k // 2] = 0  # a class without images
    return confusion_matrix(counts * scale, names, heading=HEADING)


def reliability(heading: str, empty: bool = False) -> Figure:
    counts = np.zeros(15, int) if empty else np.arange(15)
    middle = np.where(counts > 0, (np.arange(15) + 0.5) / 15, np.nan)
    bins = (counts, middle, middle**1.3)
    panels = {"uncalibrated: ECE 12.34%": bins, "temperature-scaled (val): ECE 12.34%": bins}
    return reliability_diagram(panels, heading=heading)


def confidence(correct: int, incorrect: int) -> Figure:
    n = correct + incorrect
    return confidence_histogram(np.random.default_rng(0).random(n), np.arange(n) < correct, heading=HEADING)


def bars(names: list[str]) -> Figure:
    scores = zip(*np.random.default_rng(0).random((3, len(names))), strict=True)
    return class_bars(scored(names, scores), heading=HEADING)


EXTREME = [{"epoch": 998, "train/loss": 1e-7, "val/acc": 0.99991}, {"epoch": 999, "train/loss": 2.5e9, "val/acc": 1.0}]
FIGURES: dict[str, Callable[[], Figure]] = {
    "samples 1": lambda: samples(1, CIFAR10),
    "samples 9": lambda: samples(9, CIFAR10),
    "samples odd": lambda: samples(10, ODD, heading=ODD[0]),
    "samples long": lambda: samples(9, long_names(9), 20, 40, heading="W" * 90),
    "samples 224": lambda: samples(3, CIFAR10, 224, 200),
    "samples 1 px": lambda: samples(3, CIFAR10, 1, 1),
    "no predictions": lambda: predictions(0, CIFAR10),
    "predictions 7": lambda: predictions(7, CIFAR10),
    "predictions odd": lambda: predictions(10, ODD),
    "predictions long": lambda: predictions(6, long_names(100)),
    "matrix 1": lambda: matrix(["cat"]),
    "matrix 2": lambda: matrix(["cat", "dog"]),
    "matrix 10 odd": lambda: matrix(ODD),
    "matrix 16 long": lambda: matrix(long_names(16), 10**6),
    "matrix 17 long": lambda: matrix(long_names(17), 10**6),
    "matrix 100": lambda: matrix([f"class {i}" for i in range(100)]),
    **{f"curves {n}": lambda n=n: plots.curves(history(n), heading=HEADING) for n in (1, 8, 200)},
    "curves extreme": lambda: plots.curves(EXTREME, heading="Extreme"),
    "curves without values": lambda: plots.curves([{"epoch": 0, "val/acc": float("nan")}], heading="None"),
    "gradients": lambda: plots.gradient_flow(gradients(200), heading=HEADING),
    "gradients 1": lambda: plots.gradient_flow(gradients(1, 4), heading=HEADING),
    "gradients 49": lambda: plots.gradient_flow(gradients(40, 49), heading=HEADING),
    "reliability": lambda: reliability("W" * 90),
    "reliability empty": lambda: reliability(HEADING, empty=True),
    "bars 1": lambda: bars(["cat"]),
    "bars odd": lambda: bars(ODD),
    "bars long": lambda: bars(long_names(41)),
    "search 1": lambda: plots.search_history({0: 0.5}, [], heading=HEADING),
    "search 300": lambda: plots.search_history({n: n / 300 for n in range(300)}, range(9, 300, 3), heading=HEADING),
    "importance odd": lambda: plots.importance_bars(
        dict(zip(ODD, [1, *[0] * 9], strict=True)), heading=HEADING, note="n"
    ),
    **{f"confidence {c} {i}": lambda c=c, i=i: confidence(c, i) for c, i in ((0, 0), (0, 3), (10**6, 7))},
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off_or_overlaps(name: str) -> None:
    fig = FIGURES[name]()
    for dpi in (fig.dpi, 120):  # the width of hinted letters depends on it
        fig.set_dpi(dpi)
        fig.draw_without_rendering()
        texts = shown(fig)
        boxes = np.array([text.get_window_extent().extents for text in texts])
        low, high = boxes[:, :2], boxes[:, 2:]
        outside = (low < 0).any(1) | (high > fig.bbox.size).any(1)
        assert not outside.any(), [texts[i].get_text() for i in np.flatnonzero(outside)]
        overlap = ((low[:, None] < high[None] - 0.1) & (low[None] < high[:, None] - 0.1)).all(-1)
        pairs = np.argwhere(np.triu(overlap, 1))
        assert not len(pairs), [(texts[i].get_text(), texts[j].get_text()) for i, j in pairs[:5]]


@pytest.mark.parametrize("name", ["samples 1", "no predictions", "matrix 2", "curves 8", "reliability", "bars 1"])
def test_the_users_matplotlibrc_has_no_effect(name: str) -> None:
    expected = plots.to_png(FIGURES[name]())
    user = {"text.usetex": True, "font.family": "serif", "font.size": 30, "lines.linewidth": 9, "axes.grid": True}
    user |= {"savefig.dpi": 30, "savefig.bbox": "tight", "axes.facecolor": "black", "axes.unicode_minus": False}
    with mpl.rc_context(user):
        assert plots.to_png(FIGURES[name]()) == expected


def test_names_without_a_letter_in_the_font_are_numbered() -> None:
    names = ["猫", "狗", "Katze 猫", "_"]
    assert legible(names) == ["class 0", "class 1", "Katze 猫", "class 3"]
    written = strings(confusion_matrix(np.eye(4, dtype=int), names, heading="h"))
    assert {"class 0", "class 1", "Katze □"} <= set(written)


def test_a_percentage_is_0_or_100_only_if_exact() -> None:
    fractions = [0.0, 4e-5, 0.004, 0.5, 0.9996, 1.0, float("nan")]
    assert [as_percent(f) for f in fractions] == ["0%", "<0.1%", "0.4%", "50.0%", ">99.9%", "100%", "n/a"]
    assert [as_percent(f, 2) for f in (4e-5, 6e-5, 0.99994, 0.99996)] == ["<0.01%", "0.01%", "99.99%", ">99.99%"]
