"""Views of images for test-time augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor


def additional_views(images: Tensor, name: str) -> Iterator[Tensor]:
    """Yield the views that are evaluated in addition to the images themselves.

    "flip" adds the horizontal mirror image. "flip_shift" also moves both by one pixel up and left, and by one pixel
    down and right, with a reflected border: the six views of https://arxiv.org/abs/2404.00498, equally weighted.

    Args:
        images: uint8 [N, 3, H, W], as is each view.
        name: "flip" or "flip_shift".
    """
    yield images.flip(-1)
    if name == "flip_shift":
        height, width = images.shape[-2:]
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").byte()  # uint8 cannot be reflected
        for offset in (2, 0):
            shifted = padded[..., offset : offset + height, offset : offset + width]
            yield shifted
            yield shifted.flip(-1)
