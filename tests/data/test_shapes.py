import pytest
import torch
from torch import Tensor

from cifar10_tl.data.shapes import CLASS_NAMES, draw_shapes


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of ridge regression from features [N, D] to one-hot labels."""
    mean = train.mean(0)
    train, test = train - mean, test - mean
    targets = torch.nn.functional.one_hot(train_labels, len(CLASS_NAMES)).float() - 1 / len(CLASS_NAMES)
    # The dual form solves [N, N] and not [D, D]: there are fewer images than pixels.
    dual = torch.linalg.solve(train @ train.T + 300 * torch.eye(len(train)), targets)
    predictions = (test @ train.T @ dual).argmax(1)
    return (predictions == test_labels).float().mean().item()


def test_ten_distinct_one_word_classes():
    assert len(set(CLASS_NAMES)) == 10
    assert all(name.isalpha() and name.islower() for name in CLASS_NAMES)


@pytest.mark.parametrize("image_size", [8, 32, 45])
def test_shapes_dtypes_and_range(image_size):
    images, labels = draw_shapes(30, seed=0, image_size=image_size)
    assert images.shape == (30, 3, image_size, image_size)
    assert images.dtype == torch.uint8
    assert labels.shape == (30,)
    assert labels.dtype == torch.int64
    assert images.min() < 30
    assert images.max() > 225


def test_no_images():
    images, labels = draw_shapes(0, seed=0)
    assert images.shape == (0, 3, 32, 32)
    assert labels.shape == (0,)


@pytest.mark.parametrize("num_images", [7, 10, 99, 101, 256])
def test_class_counts_differ_by_at_most_one(num_images):
    counts = draw_shapes(num_images, seed=3)[1].bincount(minlength=10)
    assert counts.sum() == num_images
    assert counts.max() - counts.min() <= 1


def test_order_is_shuffled():
    tens = draw_shapes(200, seed=0)[1].view(20, 10)
    assert len({tuple(row.tolist()) for row in tens}) == 20


def test_two_calls_are_equal_whatever_the_global_random_state():
    torch.manual_seed(0)
    first = draw_shapes(120, seed=5)
    torch.manual_seed(1)
    second = draw_shapes(120, seed=5)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("num_images", [1, 99, 100, 101, 230])
def test_longer_set_starts_with_the_shorter_one(num_images):
    images, labels = draw_shapes(num_images, seed=2)
    longer_images, longer_labels = draw_shapes(300, seed=2)
    assert torch.equal(images, longer_images[:num_images])
    assert torch.equal(labels, longer_labels[:num_images])


def test_no_image_repeats_within_or_across_seeds():
    images = torch.cat([draw_shapes(300, seed)[0] for seed in (0, 1, 100)])
    assert len(images.flatten(1).unique(dim=0)) == 900


def test_seeds_order_the_labels_differently():
    assert not torch.equal(draw_shapes(100, seed=0)[1], draw_shapes(100, seed=1)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": -1, "seed": 0}, "num_images must be zero or more, got -1"),
        ({"num_images": 1, "seed": -2}, "seed must be zero or more, got -2"),
        ({"num_images": 1, "seed": 0, "image_size": 7}, "image_size must be at least 8, got 7"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        draw_shapes(**arguments)


def test_pixels_and_mean_colour_do_not_separate_the_classes():
    train, train_labels = draw_shapes(1000, seed=0)
    test, test_labels = draw_shapes(1000, seed=1)
    train, test = train / 255, test / 255
    by_pixels = linear_accuracy(train.flatten(1), train_labels, test.flatten(1), test_labels)
    by_colour = linear_accuracy(train.mean((2, 3)), train_labels, test.mean((2, 3)), test_labels)
    assert 0.25 < by_pixels < 0.5  # outlines sit near the centre, so better than chance, yet far from solved
    assert by_colour < 0.25
