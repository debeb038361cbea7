"""Other looks at the same images, whose predictions are averaged (test-time augmentation)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cifar10_tl.data.batch import Split
from cifar10_tl.metrics.evaluation import Evaluation

VIEWS = ("none", "flip", "flip_shift")


_SHIFTS = ((0, 0), (-1, -1), (1, 1))


def further_views(images: Tensor, name: str) -> Iterator[Tensor]:
    """The views that ``name`` adds to the images themselves (uint8 [N, 3, H, W], as each view is).

    "flip" adds the mirror image. "flip_shift" moves both by one pixel up and left, and by one down and right, the
    border mirrored: six views with the images themselves, those of https://arxiv.org/abs/2404.00498 but
    with one weight for all.

    Raises:
        ValueError: there is no such ``name``.
    """
    if name not in VIEWS:
        raise ValueError(f"{name}: there are {', '.join(VIEWS)}")
    if name == "none":
        return
    for shift in _SHIFTS[: 1 if name == "flip" else None]:
        moved = _shifted(images, *shift)
        if any(shift):
            yield moved
        yield moved.flip(-1)


def _shifted(images: Tensor, down: int, right: int) -> Tensor:
    if not (down or right):
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").byte()  # reflecting is not there for uint8
    return padded[..., 1 - down : 1 - down + height, 1 - right : 1 - right + width]


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
