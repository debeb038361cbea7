"""TrivialAugment Wide (https://arxiv.org/abs/2103.10158) of a batch, with torchvision's result for each image."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from cifar10_tl.data.keyed_rng import copied_to

Operation = Callable[[Tensor, Tensor], Tensor]  # of uint8 images [n, 3, H, W] and magnitudes [n] on the CPU

LEVELS = 31


def trivial_augment(images: Tensor, operations: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Return uint8 images [N, 3, H, W], each transformed by its own operation.

    Args:
        images: Images to transform, uint8 [N, 3, H, W].
        operations: Position in :data:`OPERATIONS`, int64 [N] on the CPU.
        levels: Strength from 0 to ``LEVELS - 1``, int64 [N] on the CPU.
        signs: 1 or -1, the direction of operations that have one, [N] on the CPU.
    """
    counts, order = operations.bincount(minlength=len(OPERATIONS)).tolist(), operations.argsort()
    by_operation = torch.split(images.index_select(0, copied_to(images.device, order)), counts)
    magnitudes = torch.split((_SCALES[operations, levels] * signs)[order], counts)
    groups = zip(OPERATIONS, by_operation, magnitudes, strict=True)
    augmented = torch.cat([operation(group, values) for (_, _, operation), group, values in groups if len(group)])
    return augmented.index_select(0, copied_to(images.device, order.argsort()))


def _warp(
    images: Tensor,
    *,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    dx: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    dy: Tensor | float = 0.0,
) -> Tensor:
    """Copy the pixel at (x, y) from (xx * x + xy * y + dx, yx * x + yy * y + dy), rounded; black outside the image.

    Coordinates are in pixels from the center; tensors are [n] on the CPU.
    """
    height, width = images.shape[2:]
    entries = (xx, xy * height / width, dx * 2 / width, yx * width / height, yy, dy * 2 / height)
    columns = torch.broadcast_tensors(*map(torch.as_tensor, entries))  # type: ignore[no-untyped-call]
    matrices = torch.stack(columns, 1).view(-1, 2, 3)
    grid = F.affine_grid(copied_to(images.device, matrices), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).byte()


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return _warp(images, xx=cos, xy=-sin, yx=sin, yy=cos)


def _enhanced(adjust: Callable[[Tensor, float], Tensor]) -> Operation:
    """Return torchvision's ``adjust`` with different factors; it blends an image with its result for the factor 0."""

    def operation(images: Tensor, magnitudes: Tensor) -> Tensor:
        factor = copied_to(images.device, 1 + magnitudes)[:, None, None, None]
        return (images * factor + adjust(images, 0.0) * (1 - factor)).clamp(0, 255).byte()

    return operation


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    unit = copied_to(images.device, 2 ** (8 - bits.abs().round()).int())[:, None, None, None]
    return (images // unit * unit).byte()


def _solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    smallest = copied_to(images.device, 255 * thresholds.abs())[:, None, None, None]
    return torch.where(images >= smallest, 255 - images, images)


#: The magnitude at the first and the last level, and the function, in torchvision's order.
OPERATIONS: tuple[tuple[float, float, Operation], ...] = (
    (0, 0, lambda images, _: images),
    (0, 0.99, lambda images, m: _warp(images, xy=m, dx=m * images.shape[2] / 2)),  # the top row stays
    (0, 0.99, lambda images, m: _warp(images, yx=m, dy=m * images.shape[3] / 2)),
    (0, 32, lambda images, m: _warp(images, dx=-m.trunc())),
    (0, 32, lambda images, m: _warp(images, dy=-m.trunc())),
    (0, 135, _rotate),
    (0, 0.99, _enhanced(tv.adjust_brightness)),
    (0, 0.99, _enhanced(tv.adjust_saturation)),
    (0, 0.99, _enhanced(tv.adjust_contrast)),
    (0, 0.99, _enhanced(tv.adjust_sharpness)),
    (8, 2, _posterize),
    (1, 0, _solarize),
    (0, 0, lambda images, _: tv.autocontrast(images)),
    (0, 0, lambda images, _: tv.equalize(images)),
)
_SCALES = torch.stack([torch.linspace(low, high, LEVELS) for low, high, _ in OPERATIONS])
