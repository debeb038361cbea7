"""Augmentation of a whole uint8 batch, with independent random numbers for each image.

The random numbers and all that depends on them alone, such as boxes, are computed on the CPU, the pixels on their
device: a few dozen numbers per image are not worth the launch of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from cifar10_tl.data.batch import Batch
from cifar10_tl.data.keyed_rng import KeyedRNG, copied_to
from cifar10_tl.data.trivial_augment import LEVELS, OPERATIONS, trivial_augment


@dataclass(frozen=True)
class Augment:
    """Settings of :func:`augment`.

    Attributes:
        horizontal_flip: Flip images horizontally with probability 0.5. "alternating": a random half in the first epoch,
            then each image in every second epoch (https://arxiv.org/abs/2404.00498, section 3.6).
        random_crop_padding: Reflection padding in pixels before a random crop to the original size.
        random_resized_crop: Range of the area, as a fraction, of a random box (https://arxiv.org/abs/1409.4842) with an
            aspect ratio from 3/4 to 4/3. The network crops and resizes at once, see :attr:`Batch.boxes`.
        trivial_augment: Apply one of 14 operations of random strength to each image, see :func:`trivial_augment`.
        random_erasing: Probability of replacing a random rectangle (2 to 33% of the area) with gray.
        cutout: Side in pixels of a gray square around a random pixel (https://arxiv.org/abs/1708.04552); 0 for none.
        color_jitter: Maximum relative change of brightness, contrast and saturation.
        mix: "none", "mixup" (https://arxiv.org/abs/1710.09412) or "cutmix" (https://arxiv.org/abs/1905.04899).
        mix_alpha: Both parameters of the Beta distribution of the weight of the second image.
        mix_off_last: Fraction of the epochs, at the end of training, without mixing.
    """

    horizontal_flip: bool | Literal["alternating"] = False
    random_crop_padding: int = 0
    random_resized_crop: Sequence[float] | None = None
    trivial_augment: bool = False
    random_erasing: float = 0.0
    cutout: int = 0
    color_jitter: float = 0.0
    mix: Literal["none", "mixup", "cutmix"] = "none"
    mix_alpha: float = 1.0
    mix_off_last: float = 0.0

    def in_epoch(self, epoch: int, max_epochs: int) -> Augment:
        """Return the settings for one epoch of a run of ``max_epochs`` epochs (-1: no limit)."""
        epochs_off = round(self.mix_off_last * max_epochs)
        return replace(self, mix="none") if epochs_off > 0 and epoch >= max_epochs - epochs_off else self


def augment(batch: Batch, settings: Augment, *, seed: int, epoch: int, num_classes: int) -> Batch:
    """Return an augmented batch, with one view [N, ...] of its cached features if it has them.

    Mixing combines each image with the one half a batch away. If ``world_size`` divides half of the global batch, the
    pairs are the same for any number of processes.
    """
    images, targets, indices, features, boxes = batch
    draw = KeyedRNG(seed, epoch, indices)
    if features is not None:
        return _choose_view(batch, features, draw, settings)
    if settings.horizontal_flip or settings.random_crop_padding:
        images = _flip_and_crop(images, draw, settings)
    if settings.trivial_augment:
        levels, signs = draw.integer("level", LEVELS), 1 - 2 * draw.integer("sign", 2)
        images = trivial_augment(images, draw.integer("operation", len(OPERATIONS)), levels, signs)
    if settings.color_jitter:
        images = _jitter(images, draw, settings.color_jitter)
    if settings.random_erasing:
        images = _erase(images, draw, settings.random_erasing)
    if settings.cutout:
        images = _cut_out(images, draw, settings.cutout)
    if settings.random_resized_crop:
        boxes = _crop_boxes(images, draw, *settings.random_resized_crop)
    if settings.mix != "none":
        images, targets = _mix(images, targets, boxes, draw, settings, num_classes)
    return Batch(images, targets, indices, boxes=None if boxes is None else copied_to(images.device, boxes))


def _choose_view(batch: Batch, features: Tensor, draw: KeyedRNG, settings: Augment) -> Batch:
    if not settings.horizontal_flip:
        return batch._replace(features=features[:, 0])
    mirrored = copied_to(features.device, _mirrored(draw, settings))
    images = torch.where(mirrored[:, None, None, None], batch.images.flip(-1), batch.images)
    rows = torch.arange(len(features), device=features.device)
    return batch._replace(images=images, features=features[rows, mirrored.long()])


def _mirrored(draw: KeyedRNG, settings: Augment) -> Tensor:
    """Return which images are flipped, bool [N]."""
    if settings.horizontal_flip == "alternating":
        return (KeyedRNG(draw.seed, 0, draw.indices).uniform("flip") < 0.5) ^ (draw.epoch % 2 == 1)
    return draw.uniform("flip") < 0.5


def _flip_and_crop(images: Tensor, draw: KeyedRNG, settings: Augment) -> Tensor:
    """Flip and crop by one gather of the source row and column of each pixel."""
    _, channels, height, width = images.shape
    padding = settings.random_crop_padding
    rows = torch.arange(height).expand(len(images), -1)
    columns = torch.arange(width).expand(len(images), -1)
    if settings.horizontal_flip:
        columns = torch.where(_mirrored(draw, settings)[:, None], width - 1 - columns, columns)
    if padding:
        rows = _reflect(rows + draw.integer("top", 2 * padding + 1)[:, None] - padding, height)
        columns = _reflect(columns + draw.integer("left", 2 * padding + 1)[:, None] - padding, width)
    rows, columns = copied_to(images.device, rows * width), copied_to(images.device, columns)
    source = (rows[:, :, None] + columns[:, None, :]).flatten(1)
    return images.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view_as(images)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Reflect positions outside [0, size) at the border pixels, as ``F.pad(mode="reflect")`` does."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def _crop_boxes(images: Tensor, draw: KeyedRNG, smallest: float, largest: float) -> Tensor:
    """Return a random box [N, 4] per image, with a narrower range of aspect ratios where the box would not fit."""
    area = smallest + (largest - smallest) * draw.uniform("crop_area")
    limit = (-area.log()).clamp_max(log(4 / 3))
    aspect = (limit * (2 * draw.uniform("crop_aspect") - 1)).exp()  # log-uniform
    return _random_boxes(images, draw, (area / aspect).sqrt(), (area * aspect).sqrt(), ("crop_y", "crop_x"))


def _jitter(images: Tensor, draw: KeyedRNG, strength: float) -> Tensor:
    """Change brightness, contrast and saturation as torchvision does, with different factors for each image."""

    def factor(name: str) -> Tensor:
        return copied_to(images.device, 1 + strength * (2 * draw.uniform(name) - 1))[:, None, None, None]

    x = images.float() * factor("brightness")
    x = torch.lerp(rgb_to_grayscale(x).mean((2, 3), keepdim=True), x, factor("contrast"))
    x = torch.lerp(rgb_to_grayscale(x), x, factor("saturation"))
    return x.round().clamp(0, 255).byte()


def _erase(images: Tensor, draw: KeyedRNG, probability: float) -> Tensor:
    """Erase a random rectangle with gray (https://arxiv.org/abs/1708.04896)."""
    area = 0.02 + 0.31 * draw.uniform("area")
    aspect = 0.3 ** (1 - 2 * draw.uniform("aspect"))  # log-uniform in [0.3, 1/0.3]
    boxes = _random_boxes(images, draw, (area * aspect).sqrt(), (area / aspect).sqrt(), ("erase_y", "erase_x"))
    boxes[draw.uniform("erase") >= probability] = 0
    return images.masked_fill(_inside(images, boxes), 128)


def _cut_out(images: Tensor, draw: KeyedRNG, side: int) -> Tensor:
    height, width = images.shape[2:]
    top, left = draw.integer("cutout_y", height) - side // 2, draw.integer("cutout_x", width) - side // 2
    length = torch.full_like(top, side)
    return images.masked_fill(_inside(images, torch.stack([top, left, length, length], 1)), 128)


def _random_boxes(images: Tensor, draw: KeyedRNG, heights: Tensor, widths: Tensor, names: tuple[str, str]) -> Tensor:
    """Return the top, left, height and width [N, 4] of a random box per image, given fractions [N] of its sides."""
    starts, lengths = [], []
    for size, fraction, name in zip(images.shape[2:], (heights, widths), names, strict=True):
        lengths.append((fraction * size).round().clamp(0, size))
        starts.append((draw.uniform(name) * (size - lengths[-1] + 1)).floor())
    return torch.stack([*starts, *lengths], 1)


def _inside(images: Tensor, boxes: Tensor) -> Tensor:
    """Return masks [N, 1, H, W] of the pixels inside boxes [N, 4] on the CPU."""
    inside = []
    for size, start, length in zip(images.shape[2:], boxes[:, :2].T, boxes[:, 2:].T, strict=True):
        position = torch.arange(size)
        within = (position >= start[:, None]) & (position < (start + length)[:, None])
        inside.append(copied_to(images.device, within))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def _mix(
    images: Tensor, targets: Tensor, crops: Tensor | None, draw: KeyedRNG, settings: Augment, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with the one half a batch away; both are seen through the crop of the first."""
    half = len(images) // 2
    second = images.roll(-half, 0)
    fraction = _beta(draw.uniform("mix"), settings.mix_alpha)
    if settings.mix == "mixup":
        fraction = copied_to(images.device, fraction)
        images = torch.lerp(images.float(), second.float(), fraction[:, None, None, None]).round().byte()
    else:
        side = fraction.sqrt()
        box = _inside(images, _random_boxes(images, draw, side, side, ("y", "x")))
        images = torch.where(box, second, images)
        fraction = box.float().mean((1, 2, 3))  # after rounding to whole pixels
        if crops is not None:
            seen = (box & _inside(images, crops)).sum((1, 2, 3))
            fraction = seen / copied_to(images.device, crops[:, 2:].prod(1))
    one_hot = F.one_hot(targets, num_classes).float()
    return images, torch.lerp(one_hot, one_hot.roll(-half, 0), fraction[:, None])


def _beta(uniform: Tensor, alpha: float) -> Tensor:
    """Transform uniform numbers to Beta(alpha, alpha) by a table of the inverse cumulative distribution."""
    values, cumulative = _beta_table(alpha)
    position = torch.searchsorted(cumulative, uniform.contiguous()).clamp(1, len(values) - 1)
    low, high = cumulative[position - 1], cumulative[position]
    between = (uniform - low) / (high - low).clamp_min(1e-12)
    return torch.lerp(values[position - 1], values[position], between.clamp(0, 1))


@cache
def _beta_table(alpha: float) -> tuple[Tensor, Tensor]:
    """Return values and the cumulative distribution of Beta(alpha, alpha) at them, float32 [2049] each."""
    t = torch.linspace(0, 0.5, 1025, dtype=torch.float64)
    power = max(1.0, 1 / alpha)  # denser near 0, where the density may have a pole
    values = t**power / (t**power + (1 - t) ** power)
    middle = (values[1:] + values[:-1]) / 2
    mass = (middle * (1 - middle)) ** (alpha - 1) * values.diff()
    cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum() / 2])
    # The distribution is symmetric.
    return tuple(torch.cat([x, 1 - x[:-1].flip(0)]).float() for x in (values, cumulative))  # type: ignore[return-value]
