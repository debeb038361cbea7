"""The same network on changed images: several views averaged, and images made worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cifar10_tl.data.corruption import CORRUPTIONS, corrupted
from cifar10_tl.data.datamodule import Split
from cifar10_tl.data.views import further_views
from cifar10_tl.evaluation import Evaluation

#: Evaluates the images of a split; the text says what for.
Pass = Callable[[Split, str], Evaluation]


def views_averaged(run: Pass, split: Split, evaluation: Evaluation, name: str) -> dict[str, Any]:
    """The scores with test-time augmentation, see :func:`~cifar10_tl.data.views.further_views`.

    Args:
        run: evaluates images.
        split: the images.
        evaluation: of the images as they are.
        name: of the views.
    """
    views = [evaluation]
    for images in further_views(split.images, name):
        views.append(run(Split(images, split.labels, split.indices), f"view {len(views) + 1}"))
    return {"name": name, "views": len(views), **Evaluation.mean_of(views).scores()}


def robustness(run: Pass, split: Split, evaluation: Evaluation, name: str) -> dict[str, list[dict[str, Any]]]:
    """For each kind of corruption, accuracy and loss at each severity, 0 being the images as they are.

    Args:
        run: evaluates images.
        split: the images.
        evaluation: of the images as they are.
        name: of a kind in :mod:`cifar10_tl.data.corruption`, or "all".
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in CORRUPTIONS if name == "all" else [name]:
        found[kind] = [{"severity": 0, **evaluation.metrics()}]
        for severity in range(1, len(CORRUPTIONS[kind][1]) + 1):
            images = corrupted(split.images, split.indices, kind, severity)
            outcome = run(Split(images, split.labels, split.indices), f"{kind} at severity {severity}")
            found[kind].append({"severity": severity, **outcome.metrics()})
    return found
