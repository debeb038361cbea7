"""Inputs of the figures, and what is written on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from cifar10_tl.metrics.evaluation import Evaluation

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ODD = ["$x_1$ & $", "a_b^c", r"$\alpha {$", "naïve λ", "猫", "two\nlines", "%", "", "W" * 60, "<b>&amp;"]
HEADING = "A heading that is a good deal longer than one picture is wide, so that it has to be wrapped"


def pictures(n: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def evaluation(probabilities: np.ndarray, labels: np.ndarray, names: list[str]) -> Evaluation:
    logits = torch.tensor(probabilities).clamp(min=1e-30).log().float()
    return Evaluation.of(logits, torch.tensor(labels), torch.arange(len(labels)), names)


def scored(names: Iterable[str], scores: Iterable[Sequence[float]]) -> list[dict[str, Any]]:
    """Rows of precision, recall and F1."""
    return [{"class": c, "precision": p, "recall": r, "f1": f} for c, (p, r, f) in zip(names, scores, strict=True)]


def long_names(k: int) -> list[str]:
    return [f"folder_{'WmXo'[i % 4] * 10}_{i:02d}" for i in range(k)]


def history(n: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for epoch in range(n):
        up = 1 - 1 / (epoch + 2)
        rows.append({"epoch": epoch, "train/acc": up, "val/acc": 0.9 * up, "train/loss": 1 - up, "val/loss": 1})
    return rows


def gradients(n: int, time_steps: int = 0) -> list[dict[str, Any]]:
    stages, steps = ("stem", "layer1", "layer2", "layer3", "layer4", "head"), range(1, time_steps + 1)
    return [
        {
            "epoch": epoch,
            "stages": {stage: 10.0 ** (i - 3) / (epoch + 1) for i, stage in enumerate(stages)},
            "time_steps": [10.0 ** (t - time_steps) / (epoch + 1) for t in steps],
        }
        for epoch in range(n)
    ]


def _texts(axes: Axes) -> list[Text]:
    texts = list(axes.texts)
    if legend := axes.get_legend():
        texts += legend.get_texts()
    if axes.axison:
        texts += [axes.xaxis.label, axes.yaxis.label, axes.title]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
            texts += [label for at, label in ticks if min(limits) <= at <= max(limits)]
    return texts


def shown(fig: Figure) -> list[Text]:
    """Every text that is drawn."""
    texts = [*fig.texts, *(text for axes in fig.axes for text in _texts(axes))]
    return [text for text in texts if text.get_visible() and text.get_text()]


def rendered(fig: Figure) -> np.ndarray:
    """The pixels of a figure, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def strings(fig: Figure) -> list[str]:
    return [text.get_text() for text in shown(fig)]
