from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cifar10_tl.data.shapes import CLASS_NAMES, draw_shapes


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy of ridge regression from features [N, D] to one-hot labels."""
    mean = train.mean(0)
    train, test = train - mean, test - mean
    targets = torch.nn.functional.one_hot(train_labels, len(CLASS_NAMES)).float() - 1 / len(CLASS_NAMES)
    # The dual form solves [N, N] and not [D, D]: there are fewer images than pixels.
    dual = torch.linalg.solve(train @ train.T + 300 * torch.eye(len(train)), targets)
    predictions = (test @ train.T @ dual).argmax(1)
    return (predictions == test_labels).float().mean().item()


@pytest.mark.parametrize("image_size", [8, 32, 45])
def test_shapes_dtypes_and_range(image_size: int) -> None:
    images, labels = draw_shapes(30, seed=0, image_size=image_size)
    assert images.shape == (30, 3, image_size, image_size)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.min() < 30
    assert images.max() > 225


def test_classes_are_balanced_in_random_order() -> None:
    labels = draw_shapes(256, seed=3)[1]
    counts = labels.bincount(minlength=10)
    assert (counts.sum(), counts.max() - counts.min()) == (256, 1)
    assert len({tuple(ten.tolist()) for ten in labels[:200].view(20, 10)}) == 20
    assert not torch.equal(draw_shapes(100, seed=0)[1], draw_shapes(100, seed=1)[1])


@pytest.mark.parametrize("num_images", [99, 100, 101])
def test_longer_set_starts_with_the_shorter_one(num_images: int) -> None:
    torch.manual_seed(0)  # is not used
    shorter = draw_shapes(num_images, seed=2)
    torch.manual_seed(1)
    longer = draw_shapes(120, seed=2)
    for a, b in zip(shorter, longer, strict=True):
        assert torch.equal(a, b[:num_images])


def test_no_image_repeats_within_or_across_seeds() -> None:
    images = torch.cat([draw_shapes(200, seed)[0] for seed in (0, 1, 100)])
    assert len(images.flatten(1).unique(dim=0)) == 600


def test_pixels_and_mean_color_do_not_separate_the_classes() -> None:
    train, train_labels = draw_shapes(500, seed=0)
    test, test_labels = draw_shapes(500, seed=1)
    train, test = train / 255, test / 255
    by_pixels = linear_accuracy(train.flatten(1), train_labels, test.flatten(1), test_labels)
    by_color = linear_accuracy(train.mean((2, 3)), train_labels, test.mean((2, 3)), test_labels)
    assert 0.25 < by_pixels < 0.5  # outlines are near the center, so better than chance, but far from solved
    assert by_color < 0.25
