"""Images made worse, to see how much a classifier can take.

Five kinds at five severities, of our own making: they are *not* those of CIFAR-10-C (Hendrycks and Dietterich,
https://arxiv.org/abs/1903.12261), whose idea this is, and accuracies on the one must not be compared with the other.

| kind | what happens | severity 1 to 5 |
|---|---|---|
| noise | Gaussian noise on each value, standard deviation as a share of the range | 0.02, 0.04, 0.07, 0.11, 0.16 |
| blur | Gaussian blur, standard deviation in pixels of an image of 32 | 0.4, 0.6, 0.8, 1.1, 1.5 |
| contrast | the distance from the image's mean grey, times | 0.75, 0.6, 0.45, 0.3, 0.15 |
| jpeg | written as JPEG (4:2:0) and read again, quality | 60, 40, 25, 15, 8 |
| brightness | this share of the range is added, and cut at white | 0.1, 0.2, 0.3, 0.4, 0.5 |

What an image becomes depends on nothing but the kind, the severity and the image with its index.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from cifar10_tl.data.batch import Split
from cifar10_tl.data.keyed_rng import hash32
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.metrics.tta import Pass

_CHUNK = 500  # images at a time: a random draw takes 8 bytes a value


def corrupted(images: Tensor, indices: Tensor, kind: str, severity: int) -> Tensor:
    """The images (uint8 [N, 3, H, W], with their ``indices`` int64 [N]) as ``kind`` and ``severity`` make them.

    Raises:
        ValueError: there is no such kind or severity.
    """
    if kind not in CORRUPTIONS or not 1 <= severity <= len(CORRUPTIONS[kind][1]):
        raise ValueError(f"{kind} at severity {severity}: there are {', '.join(CORRUPTIONS)} at 1 to 5")
    corrupt, strengths = CORRUPTIONS[kind]
    chunks = (slice(start, start + _CHUNK) for start in range(0, len(images), _CHUNK))
    return torch.cat([corrupt(images[chunk], indices[chunk], strengths[severity - 1]) for chunk in chunks])


def _noise(images: Tensor, indices: Tensor, deviation: float) -> Tensor:
    """The draw of a pixel is the same at each severity."""
    pixels = torch.arange(images[0].numel()).view(images[0].shape)
    key = hash32(0xC0, indices[:, None, None, None], pixels)
    radius = (-2 * (1 - _uniform(hash32(key, 0))).log()).sqrt()  # Box and Muller (1958)
    normal = radius * (2 * math.pi * _uniform(hash32(key, 1))).cos()
    return _as_bytes(images + 255 * deviation * normal)


def _uniform(bits: Tensor | int) -> Tensor:
    assert isinstance(bits, Tensor)
    return (bits >> 8).float() * 2.0**-24  # in [0, 1)


def _blur(images: Tensor, indices: Tensor, deviation: float) -> Tensor:
    sigma = deviation * images.shape[-1] / 32
    side = 2 * math.ceil(3 * sigma) + 1
    return _as_bytes(gaussian_blur(images.float(), [side, side], [sigma, sigma]))


def _contrast(images: Tensor, indices: Tensor, factor: float) -> Tensor:
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
    grey = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return _as_bytes(torch.lerp(grey, images.float(), factor))


def _jpeg(images: Tensor, indices: Tensor, quality: float) -> Tensor:
    return torch.stack([_through_jpeg(image, int(quality)) for image in images])


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def _brightness(images: Tensor, indices: Tensor, share: float) -> Tensor:
    return _as_bytes(images + 255 * share)


def _as_bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).byte()


#: Each kind with its strengths at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], tuple[float, ...]]] = {
    "noise": (_noise, (0.02, 0.04, 0.07, 0.11, 0.16)),
    "blur": (_blur, (0.4, 0.6, 0.8, 1.1, 1.5)),
    "contrast": (_contrast, (0.75, 0.6, 0.45, 0.3, 0.15)),
    "jpeg": (_jpeg, (60, 40, 25, 15, 8)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
}


def robustness(run: Pass, split: Split, evaluation: Evaluation, name: str) -> dict[str, list[dict[str, Any]]]:
    """For each kind of corruption, accuracy and loss at each severity, 0 being the images as they are.

    Args:
        run: evaluates images.
        split: the images.
        evaluation: of the images as they are.
        name: of a kind in :mod:`cifar10_tl.data.corruption`, or "all".
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in CORRUPTIONS if name == "all" else [name]:
        found[kind] = [{"severity": 0, **evaluation.metrics()}]
        for severity in range(1, len(CORRUPTIONS[kind][1]) + 1):
            images = corrupted(split.images, split.indices, kind, severity)
            outcome = run(Split(images, split.labels, split.indices), f"{kind} at severity {severity}")
            found[kind].append({"severity": severity, **outcome.metrics()})
    return found
