"""Views of images for test-time augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor


def additional_views(images: Tensor, name: str) -> Iterator[Tensor]:
    """Yield the views that are evaluated in addition to the images themselves, uint8 [N, 3, H, W].

    "flip" adds the horizontal mirror image. "flip_shift" also moves both by one pixel up and left, and by one pixel
    down and right, with a reflected border: the six views of https://arxiv.org/abs/2404.00498, equally weighted.
    """
    yield images.flip(-1)
    if name == "flip_shift":
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").byte()  # uint8 cannot be reflected
        for shifted in (padded[..., 2:, 2:], padded[..., :-2, :-2]):
            yield shifted
            yield shifted.flip(-1)
