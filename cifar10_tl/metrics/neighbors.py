"""Nearest training images of evaluated images, and what they say about duplicates and labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10_tl.metrics.evaluation import Evaluation

if TYPE_CHECKING:
    from cifar10_tl.data.batch import Split

NUM_NEIGHBORS = 5
#: Lowest correlation of the pixels of near-duplicates. Of CIFAR-10's test images (JPEG, ResNet18), 1.7% have a nearest
#: training image above it among 90% of the training images; by hand, 3.3% have one: https://arxiv.org/abs/1902.00423.
DUPLICATE_CORRELATION = 0.9
PIXEL_SIDE = 16  # of the images that are correlated, so that noise and compression matter little
_CHUNK_SIZE = 2**23  # numbers per chunk of intermediate results


def nearest_neighbors(features: Tensor, train_features: Tensor, k: int = NUM_NEIGHBORS) -> tuple[Tensor, Tensor]:
    """Return the positions of the ``k`` most similar training images, int64 [N, k], and their cosine similarities.

    The most similar is first; of equally similar ones, the first. There may be fewer than ``k`` training images.

    Args:
        features: Features of the evaluated images, float32 [N, C].
        train_features: Features of the training images, float32 [M, C], M >= 1.
        k: Number of neighbors.
    """
    num_train = len(train_features)
    norms = train_features.norm(dim=1).clamp(min=1e-12)
    order = 1e-13 * torch.arange(num_train, dtype=torch.float64)  # topk leaves the order of equal values open
    positions, similarities = [], []
    for chunk in torch.split(F.normalize(features), max(1, _CHUNK_SIZE // num_train)):
        values = chunk @ train_features.T / norms
        found = (values - order).topk(min(k, num_train)).indices
        positions.append(found)
        similarities.append(values.gather(1, found))
    return torch.cat(positions), torch.cat(similarities)


def pixel_correlations(split: Split, train: Split, positions: Tensor) -> Tensor:
    """Return the correlations of the pixels of the N images of a split with those of their neighbors, float32 [N, k].

    Features show what the network considers similar, pixels whether it is the same picture.

    Args:
        split: Images.
        train: Images that contain the neighbors.
        positions: Neighbors of each image in ``train``, int64 [N, k].
    """
    size = max(1, _CHUNK_SIZE // (math.prod(train.shape[1:]) * positions.shape[1]))
    correlations = []
    for chunk, near in zip(torch.split(torch.arange(len(split)), size), torch.split(positions, size), strict=True):
        neighbors = train.take(near.flatten()).view(*near.shape, *train.shape[1:])
        correlations.append(torch.einsum("nd,nkd->nk", _pixels(split.take(chunk)), _pixels(neighbors)))
    return torch.cat(correlations)


def _pixels(images: Tensor) -> Tensor:
    """Return the pixels of reduced images, uint8 [..., 3, H, W], with norm 1, float32 [..., D].

    The mean of each channel is 0, because images of the same color are not copies.
    """
    pixels = F.adaptive_avg_pool2d(images.flatten(0, -4).float(), PIXEL_SIDE).view(*images.shape[:-2], -1)
    return F.normalize((pixels - pixels.mean(-1, keepdim=True)).flatten(-2), dim=-1)


def probable_label_errors(evaluation: Evaluation, neighbor_labels: Tensor) -> Tensor:
    """Return the positions of images whose labels are doubtful, the most confident predictions first, int64 [n].

    The network predicts another class at least as confidently as it does on average for images of that class, and all
    neighbors have that class (int64 [N, k]). Source of the first condition: the confident joint of
    https://arxiv.org/abs/1911.00068, equation 2.
    """
    members = F.one_hot(evaluation.labels, evaluation.num_classes).double()
    thresholds = (members * evaluation.probabilities).sum(0) / members.sum(0)
    errors = evaluation.incorrect(len(evaluation))
    predicted = evaluation.predictions[errors]
    is_confident = evaluation.probabilities[errors, predicted] >= thresholds[predicted]
    return errors[is_confident & (neighbor_labels[errors] == predicted[:, None]).all(1)]
