from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cifar10_tl.data.batch import Split
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.metrics import neighbors
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.metrics.neighbors import nearest_neighbors, pixel_correlations, probable_label_errors


def split(images: torch.Tensor) -> Split:
    return Split(images, torch.zeros(len(images)).long())


def test_nearest_neighbors_by_hand() -> None:
    train = torch.tensor([[0.0, 1.0], [3.0, 0.0], [2.0, 2.0], [-1.0, 0.0]])
    positions, similarities = nearest_neighbors(torch.tensor([[5.0, 0.0], [0.0, 0.1]]), train, k=3)
    assert positions.tolist() == [[1, 2, 0], [0, 2, 1]]
    assert torch.allclose(similarities, torch.tensor([[1, math.sqrt(0.5), 0]] * 2))
    assert nearest_neighbors(train[:1], train[:2])[0].tolist() == [[0, 1]], "fewer than k training images"


def test_of_equal_neighbors_the_first_come_first() -> None:
    train = torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.0, 0.0]]).repeat(400, 1)
    positions, similarities = nearest_neighbors(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), train)
    assert positions.tolist() == [[0, 3, 6, 9, 12], [0, 1, 2, 3, 4]]
    assert similarities.tolist() == [[1.0] * 5, [0.0] * 5]


def test_neighbors_do_not_depend_on_the_size_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, train = torch.randn(50, 8, generator=generator), torch.randn(70, 8, generator=generator)
    positions, similarities = nearest_neighbors(features, train)
    cosines = F.cosine_similarity(features[:, None], train, dim=2)
    assert torch.allclose(similarities, cosines.topk(5).values, atol=1e-6)
    monkeypatch.setattr(neighbors, "_CHUNK_SIZE", 70 * 3)
    assert nearest_neighbors(features, train)[0].equal(positions)


def test_correlation_of_pixels_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    images[0, :, :16], images[1, :, 16:], images[2, :, :, :16] = 200, 90, 50  # top, bottom and left halves
    for size in (neighbors._CHUNK_SIZE, 1):
        monkeypatch.setattr(neighbors, "_CHUNK_SIZE", size)
        found = pixel_correlations(split(images[:2]), split(images), torch.tensor([[0, 1, 2], [1, 0, 2]]))
        assert torch.allclose(found, torch.tensor([[1.0, -1, 0], [1, -1, 0]]), atol=1e-6)


def test_images_of_the_same_color_are_no_copies() -> None:
    color = torch.tensor([40, 200, 90])[:, None, None]
    noise = torch.randint(-30, 31, (2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    images = (color + noise).byte()
    assert pixel_correlations(split(images[:1]), split(images[1:]), torch.tensor([[0]])).abs() < 0.3


def test_a_noisy_copy_is_a_near_duplicate_and_another_image_of_the_class_is_not() -> None:
    images, _ = draw_shapes(60, seed=0, image_size=32)
    noise = torch.randint(-12, 13, images.shape, generator=torch.Generator().manual_seed(0))
    copies = (images + noise).clamp(0, 255).byte()
    correlations = pixel_correlations(split(copies), split(images), torch.arange(60).expand(60, -1))
    assert correlations.diagonal().min() > neighbors.DUPLICATE_CORRELATION
    assert correlations.fill_diagonal_(0).max() < neighbors.DUPLICATE_CORRELATION


def test_label_errors_by_hand() -> None:
    # thresholds: mean probability of a for label a (0.9 + 0.5 + 0.1) / 3 = 0.5, of b for b (0.8 + 0.4 + 0.2) / 3
    of_a, labels = torch.tensor([0.9, 0.5, 0.1, 0.2, 0.6, 0.8]), torch.tensor([0, 0, 0, 1, 1, 1])
    evaluation = Evaluation.of(torch.stack([of_a, 1 - of_a], 1).log(), labels, torch.arange(6), ["a", "b"])
    near = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1], [0, 0], [0, 0]])
    assert evaluation.incorrect(9).tolist() == [2, 5, 4]
    assert probable_label_errors(evaluation, near).tolist() == [2, 5, 4]
    near[5, 1] = 1
    assert probable_label_errors(evaluation, near).tolist() == [2, 4], "the neighbors disagree"
    logits = torch.tensor([[9.0, 0], [0.5, 0], [0, 9]])
    unsure = Evaluation.of(logits, torch.tensor([0, 1, 1]), torch.arange(3), ["a", "b"])
    assert unsure.incorrect(9).tolist() == [1]
    assert probable_label_errors(unsure, torch.zeros(3, 2).long()).tolist() == []
