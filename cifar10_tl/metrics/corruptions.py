"""Corrupted copies of images, to measure the robustness of a classifier.

These are torchvision's operations at five severities, not the corruptions of CIFAR-10-C
(https://arxiv.org/abs/1903.12261): do not compare accuracies between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

_CHUNK_SIZE = 1000  # images that are converted to floating point at once


def _noise(images: Tensor, sigma: float) -> Tensor:
    noisy = F.gaussian_noise(F.to_dtype(images, torch.float32, scale=True), sigma=sigma)
    return F.to_dtype(noisy, torch.uint8, scale=True)


def _blur(images: Tensor, sigma: float) -> Tensor:
    sigma *= images.shape[-1] / 32
    return F.gaussian_blur(images, 2 * math.ceil(3 * sigma) + 1, sigma)


#: For each kind, an operation on uint8 [N, 3, H, W] and its parameter at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "noise": (_noise, (0.02, 0.04, 0.07, 0.11, 0.16)),  # standard deviation, for values in [0, 1]
    "blur": (_blur, (0.4, 0.6, 0.8, 1.1, 1.5)),  # standard deviation in pixels of a 32-pixel image
    "contrast": (F.adjust_contrast, (0.75, 0.6, 0.45, 0.3, 0.15)),  # factor
    "jpeg": (F.jpeg, (60, 40, 25, 15, 8)),  # quality
    "brightness": (F.adjust_brightness, (1.25, 1.5, 1.75, 2.0, 2.5)),  # factor
}


def corrupt(images: Tensor, kind: str, severity: int) -> Tensor:
    """Return corrupted copies of images; the same images are always corrupted in the same way.

    Args:
        images: uint8 [N, 3, H, W].
        kind: A key of ``CORRUPTIONS``.
        severity: 1 to 5.
    """
    operation, strengths = CORRUPTIONS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.cat([operation(chunk, strengths[severity - 1]) for chunk in torch.split(images, _CHUNK_SIZE)])
