"""Random changes of training images, a whole uint8 batch at once, on whatever device it lies.

Randomness is keyed, not streamed: what happens to an image is a pure function of (seed, epoch, image index), by an
integer hash. So a run draws the same on one process or many, and after any stop and resume, with no state to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10_tl.data.batch import Batch
from cifar10_tl.data.keyed_rng import KeyedRNG


@dataclass(frozen=True)
class Augment:
    """Settings of :func:`augment`.

    Attributes:
        horizontal_flip: mirror left to right, with probability 1/2.
        random_crop_padding: pixels of reflected border before a random crop of the old size.
        random_erasing: probability that a random rectangle (2 to 33 % of the area) becomes grey.
        color_jitter: brightness, contrast and saturation each change by a factor from [1 - jitter, 1 + jitter].
        mix: "none", "mixup" (https://arxiv.org/abs/1710.09412) or "cutmix" (https://arxiv.org/abs/1905.04899).
        mix_alpha: both parameters of the Beta distribution of the second image's share.
    """

    horizontal_flip: bool = False
    random_crop_padding: int = 0
    random_erasing: float = 0.0
    color_jitter: float = 0.0
    mix: Literal["none", "mixup", "cutmix"] = "none"
    mix_alpha: float = 1.0


def augment(batch: Batch, settings: Augment, *, seed: int, epoch: int, num_classes: int) -> Batch:
    """A batch with each image changed by its own draw.

    Mixing pairs each image with the one half a batch on. Where the batch is every W-th image of a global batch whose
    half W divides, that is the image half a *global* batch on: the pairs do not depend on the number of processes.
    """
    images, targets, indices, _ = batch
    draw = KeyedRNG(seed, epoch, indices)
    if settings.horizontal_flip or settings.random_crop_padding:
        images = _flip_and_crop(images, draw, settings)
    if settings.color_jitter:
        images = _jitter(images, draw, settings.color_jitter)
    if settings.random_erasing:
        images = _erase(images, draw, settings.random_erasing)
    if settings.mix != "none":
        images, targets = _mix(images, targets, draw, settings, num_classes)
    return Batch(images, targets, indices)


def choose_view(batch: Batch, *, flip: bool, seed: int, epoch: int) -> Batch:
    """A batch of cached features [N, V, ...], the view of each (plain or mirrored) by the draw of :func:`augment`."""
    images, targets, indices, features = batch
    assert features is not None
    if not flip:
        return batch._replace(features=features[:, 0])
    mirrored = _mirrored(KeyedRNG(seed, epoch, indices))
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return Batch(
        images, targets, indices, features[torch.arange(len(features), device=features.device), mirrored.long()]
    )


def _flip_and_crop(images: Tensor, draw: KeyedRNG, settings: Augment) -> Tensor:
    """Both in one gather: each pixel of the result knows the row and the column it comes from."""
    _, channels, height, width = images.shape
    padding = settings.random_crop_padding
    rows = torch.arange(height, device=images.device).expand(len(images), -1)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    if settings.horizontal_flip:
        columns = torch.where(_mirrored(draw)[:, None], width - 1 - columns, columns)
    if padding:
        rows = _reflect(rows + draw.integer("top", 2 * padding + 1)[:, None] - padding, height)
        columns = _reflect(columns + draw.integer("left", 2 * padding + 1)[:, None] - padding, width)
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    return images.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view_as(images)


def _mirrored(draw: KeyedRNG) -> Tensor:
    return draw.uniform("flip") < 0.5


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Mirror positions outside [0, size) back in at the border pixel, as ``F.pad(mode="reflect")`` does."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def _jitter(images: Tensor, draw: KeyedRNG, strength: float) -> Tensor:
    """Brightness, contrast and saturation, in torchvision's definitions of them, but each image by its own factors."""

    def factor(name: str) -> Tensor:
        return (1 + strength * (2 * draw.uniform(name) - 1))[:, None, None, None]

    x = images.float() * factor("brightness")
    x = torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, factor("contrast"))
    x = torch.lerp(_grey(x), x, factor("saturation"))
    return x.round().clamp(0, 255).byte()


def _grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _erase(images: Tensor, draw: KeyedRNG, probability: float) -> Tensor:
    """Random erasing (https://arxiv.org/abs/1708.04896) with grey, the middle of the range."""
    area = 0.02 + 0.31 * draw.uniform("area")
    aspect = 0.3 ** (1 - 2 * draw.uniform("aspect"))  # from 0.3 to 1/0.3, even on a logarithmic scale
    box = _boxes(images, draw, (area * aspect).sqrt(), (area / aspect).sqrt())
    chosen = draw.uniform("erase") < probability
    return images.masked_fill(box & chosen[:, None, None, None], 128)


def _boxes(images: Tensor, draw: KeyedRNG, height_share: Tensor, width_share: Tensor) -> Tensor:
    """Bool [N, 1, H, W]: a rectangle in each image, wholly inside it, sides given as shares of the image's."""
    inside = []
    for size, share, name in ((images.shape[2], height_share, "y"), (images.shape[3], width_share, "x")):
        length = (share * size).round().clamp(0, size)
        start = (draw.uniform(name) * (size - length + 1)).floor()
        position = torch.arange(size, device=images.device)
        inside.append((position >= start[:, None]) & (position < (start + length)[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def _mix(images: Tensor, targets: Tensor, draw: KeyedRNG, settings: Augment, num_classes: int) -> tuple[Tensor, Tensor]:
    half = len(images) // 2
    second = images.roll(-half, 0)
    share = _beta(draw.uniform("mix"), settings.mix_alpha)
    if settings.mix == "mixup":
        weight = share[:, None, None, None]
        images = torch.lerp(images.float(), second.float(), weight).round().byte()
    else:
        side = share.sqrt()
        box = _boxes(images, draw, side, side)
        images = torch.where(box, second, images)
        share = box.float().mean((1, 2, 3))  # rounding to pixels moved it
    one_hot = F.one_hot(targets, num_classes).float()
    return images, torch.lerp(one_hot, one_hot.roll(-half, 0), share[:, None])


def _beta(uniform: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) from a uniform draw, by its inverse distribution function, read off a table."""
    values, cumulative = (table.to(uniform.device) for table in _beta_table(alpha))
    place = torch.searchsorted(cumulative, uniform.contiguous()).clamp(1, len(values) - 1)
    low, high = cumulative[place - 1], cumulative[place]
    between = (uniform - low) / (high - low).clamp_min(1e-12)
    return torch.lerp(values[place - 1], values[place], between.clamp(0, 1))


@cache
def _beta_table(alpha: float) -> tuple[Tensor, Tensor]:
    """Values of Beta(alpha, alpha) and the distribution function at them, float32 [2049] each."""
    t = torch.linspace(0, 0.5, 1025, dtype=torch.float64)
    power = max(1.0, 1 / alpha)  # crowds the values where the density may have its pole, at 0
    values = t**power / (t**power + (1 - t) ** power)
    middle = (values[1:] + values[:-1]) / 2
    mass = (middle * (1 - middle)) ** (alpha - 1) * values.diff()
    cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum() / 2])
    # the upper half mirrors the lower
    return tuple(torch.cat([x, 1 - x[:-1].flip(0)]).float() for x in (values, cumulative))  # type: ignore[return-value]
