"""Training on imbalanced classes: weights for the loss, or an order that draws each class equally often."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cifar10_tl.data.batch import Batch, Split

_REPETITION = 0x9E3779B1  # odd, so that all repetitions of an index differ in the 32 bits that hash32 uses


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return weights, float32 [K], inversely proportional to the size of each class, with mean 1 over ``labels``."""
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / (counts > 0).sum() / counts.clamp(min=1)


def balanced_order(num_images: int, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return positions, int64 [num_images], in random order, equally many of each class that occurs in ``labels``.

    The images of a class take turns. ``position + r * num_images`` is repetition r, see :class:`RepeatedImages`.
    """
    counts = torch.bincount(labels)
    shuffled = torch.randperm(num_images, generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    classes = counts.nonzero().flatten()
    classes = classes[torch.randperm(len(classes), generator=generator)]  # the first ones get the remainder
    draws = torch.arange(num_images)
    turns, drawn = draws // len(classes), classes[draws % len(classes)]
    first = (counts.cumsum(0) - counts)[drawn]
    order = by_class[first + turns % counts[drawn]] + num_images * (turns // counts[drawn])
    return order[torch.randperm(num_images, generator=generator)]


class RepeatedImages(Dataset[Batch]):
    """Split for :func:`balanced_order`, in which each repetition of an image has its own index and augmentation."""

    def __init__(self, split: Split) -> None:
        self.split, self.slow = split, split.slow  # see BatchLoader

    def __getitem__(self, positions: Tensor) -> Batch:
        batch, repetitions = self.split[positions % len(self.split)], positions // len(self.split)
        return batch._replace(indices=batch.indices + _REPETITION * repetitions.to(batch.indices.device))
