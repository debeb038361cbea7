"""Image resizing by matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Resize(nn.Module):
    """Equivalent of ``torch.nn.functional.interpolate`` to a square, with antialiasing when downsampling.

    Interpolation is separable and linear in the pixels, so it is one matrix product for the rows and one for the
    columns. On a CPU they are faster than the kernels of PyTorch and ONNX Runtime (docs/performance.md).

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

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Resize float images [N, C, H, W], or their parts inside ``boxes``, to [N, C, size, size].

        Args:
            images: float [N, C, H, W].
            boxes: Top, left, height and width in whole pixels of the part of each image, float [N, 4].
        """
        if boxes is None and images.shape[-2:] == (self.size, self.size):
            return images
        device = images.device.type
        if torch.is_autocast_enabled(device):  # avoid rounding the images to bfloat16 twice
            with torch.autocast(device, enabled=False):
                return self._resize(images, boxes)
        return self._resize(images, boxes)

    def _resize(self, images: Tensor, boxes: Tensor | None) -> Tensor:
        count, channels, height, width = images.shape
        if boxes is not None:
            rows = self._weights(boxes[:, 0], boxes[:, 2], height).to(images.dtype)
            columns = self._weights(boxes[:, 1], boxes[:, 3], width).to(images.dtype)
            wide = (images.flatten(1, 2) @ columns.mT).view(count, channels, height, self.size)
            square = rows @ wide.permute(0, 2, 3, 1).flatten(2)  # channels_last, as the backbone reads it
            return square.view(count, self.size, self.size, channels).permute(0, 3, 1, 2)
        return self._matrix(height, images) @ images @ self._matrix(width, images).T

    def _matrix(self, side: int, images: Tensor) -> Tensor:
        return self.matrix if side == self.matrix.shape[1] else self._matrix_for(side).to(images)

    def _matrix_for(self, side: int) -> Tensor:
        """Return the weights [size, side] of the input pixels in each output pixel along one axis."""
        pixels = torch.eye(side)[None, None]
        return F.interpolate(pixels, size=(self.size, side), mode=self.mode, antialias=self.size < side)[0, 0]

    def _weights(self, start: Tensor, length: Tensor, side: int) -> Tensor:
        """Return weights [N, size, side] that equal :meth:`_matrix_for` of ``length`` [N] pixels from ``start`` [N]."""
        start, length = start[:, None, None], length[:, None, None]
        pixels = torch.arange(side, device=start.device) - start
        scale = length / self.size
        # with trainer.precision=bf16-true, the default dtype cannot hold positions above 128
        centers = (torch.arange(self.size, device=start.device, dtype=start.dtype)[:, None] + 0.5) * scale - 0.5
        smaller = scale > 1  # antialiased: a wider kernel, normalized over the pixels inside
        kernel = self._kernel
        weights = kernel((pixels - centers) / scale.clamp_min(1), smaller)
        # Otherwise the pixels at the border stand for the two pixels beyond it that a kernel reaches.
        first = kernel(-1 - centers, smaller) + kernel(-2 - centers, smaller)
        last = kernel(length - centers, smaller) + kernel(length + 1 - centers, smaller)
        beyond = first * (pixels == 0) + last * (pixels == length - 1)
        weights = (weights + beyond.masked_fill(smaller, 0)) * ((pixels >= 0) & (pixels < length))
        return weights / weights.sum(2, keepdim=True)

    def _kernel(self, distances: Tensor, smaller: Tensor) -> Tensor:
        """Return the weight of pixels at these distances, by PyTorch's cubic kernel (with antialiasing: Pillow's)."""
        x = distances.abs()
        if self.mode == "bilinear":
            return (1 - x).clamp_min(0)
        a = torch.where(smaller, -0.5, -0.75)  # https://en.wikipedia.org/wiki/Bicubic_interpolation
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
        return torch.where(x < 1, near, far.masked_fill(x >= 2, 0))
