"""Image files that are decoded each time they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from cifar10_tl.config.errors import OneProcessError
from cifar10_tl.data.batch import CHUNK
from cifar10_tl.data.images import BadImageError, decode_image, in_threads


class FileImages:
    """Images that are decoded each time they are read, for ``data.cache=false``: a cache may not fit on the disk.

    Args:
        root: Folder that the paths are relative to.
        paths: Paths of the M images.
        size: Side S of the decoded images in pixels.
        fit: How other shapes become a square, see :func:`~cifar10_tl.data.images.to_pixels`.
    """

    slow = True

    def __init__(self, root: Path, paths: Sequence[str], size: int, fit: str) -> None:
        self.root, self.paths, self.size, self.fit = root, paths, size, fit
        self.shape = (len(paths), 3, size, size)

    def take(self, rows: Tensor) -> Tensor:
        """Return the images in these rows (int64 [n]), uint8 [n, 3, S, S], decoded on all cores."""
        images, positions = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8), rows.tolist()
        # the workers of a loader keep all cores busy already
        decoded = map(self._decode, positions) if get_worker_info() else in_threads(self._decode, positions, CHUNK)
        for image, pixels in zip(images.numpy(), decoded, strict=True):
            image[:] = pixels
        return images

    def _decode(self, row: int) -> NDArray[np.uint8]:
        path = self.root / self.paths[row]
        try:
            return decode_image(path, self.size, self.fit)
        except BadImageError as error:
            raise OneProcessError(f"{path} cannot be read ({error}): restore it, then start or resume again") from error
