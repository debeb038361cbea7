"""Views of images for test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from cifar10_tl.data.batch import Split


class View:
    """Images of ``split`` after ``function`` of uint8 [N, 3, H, W], computed when they are read."""

    def __init__(self, split: Split, function: Callable[[Tensor], Tensor]) -> None:
        self.split, self.function = split, function
        self.shape, self.slow = split.shape, split.slow

    def take(self, rows: Tensor) -> Tensor:
        """Return the views of the images at these positions of the split (int64 [n])."""
        return self.function(self.split.take(rows))


def additional_views(name: str) -> Sequence[Callable[[Tensor], Tensor]]:
    """Return the views that are evaluated in addition to the images themselves, as functions of uint8 [N, 3, H, W].

    "flip" adds the horizontal mirror image. "flip_shift" also moves both by one pixel up and left, and by one pixel
    down and right, with a reflected border: the six views of https://arxiv.org/abs/2404.00498, equally weighted.
    """
    shifts = (0, -1, 1) if name == "flip_shift" else (0,)
    return [partial(_moved, shift=shift, mirrored=mirrored) for shift in shifts for mirrored in (False, True)][1:]


def _moved(images: Tensor, shift: int, mirrored: bool) -> Tensor:
    """Move images by ``shift`` (-1, 0 or 1) pixels down and right, and mirror them afterwards."""
    if shift:
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").byte()  # uint8 cannot be reflected
        images = padded[..., 2:, 2:] if shift < 0 else padded[..., :-2, :-2]
    return images.flip(-1) if mirrored else images
