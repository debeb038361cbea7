"""Image resizing by matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Resize(nn.Module):
    """Equivalent of ``torch.nn.functional.interpolate`` to a square, with antialiasing when downsampling.

    Interpolation is separable and linear in the pixels, so it is one matrix product for the rows and one for the
    columns. On a CPU they take a third of the time of PyTorch's kernel, and far less than ONNX Runtime's.

    Args:
        native_size: Side in pixels of most input images, for which the matrix is kept.
        size: Side of the output in pixels.
        mode: "bicubic" or "bilinear".
    """

    def __init__(self, native_size: int, size: int, mode: str) -> None:
        super().__init__()
        self.size, self.mode = size, mode
        self.register_buffer("matrix", self._matrix_for(native_size), persistent=False)
        self.matrix: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Resize float images [N, C, H, W] to [N, C, size, size]."""
        if images.shape[-2:] == (self.size, self.size):
            return images
        rows, columns = (self._matrix(side, images) for side in images.shape[-2:])
        device = images.device.type
        if torch.is_autocast_enabled(device):  # avoid rounding the images to bfloat16 twice
            with torch.autocast(device, enabled=False):
                return rows @ images @ columns.T
        return rows @ images @ columns.T

    def _matrix(self, side: int, images: Tensor) -> Tensor:
        return self.matrix if side == self.matrix.shape[1] else self._matrix_for(side).to(images)

    def _matrix_for(self, side: int) -> Tensor:
        """Return the weights [size, side] of the input pixels in each output pixel along one axis."""
        pixels = torch.eye(side)[None, None]
        return F.interpolate(pixels, size=(self.size, side), mode=self.mode, antialias=self.size < side)[0, 0]
