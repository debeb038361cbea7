from __future__ import annotations

import pytest
import torch

from cifar10_tl.data.batch import Split
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.engine.analysis import analyze
from cifar10_tl.metrics.evaluation import Evaluation

NAMES = ["cat", "dog"]


def evaluation(labels: torch.Tensor, indices: torch.Tensor, directions: list[int], of_dog: list[float]) -> Evaluation:
    """Return an evaluation with given probabilities of dog, and features that point in one of three directions."""
    probabilities = torch.tensor(of_dog)
    logits = torch.stack([1 - probabilities, probabilities], 1).log()
    return Evaluation.of(logits, labels, indices, NAMES, torch.eye(3)[directions])


def test_a_planted_copy_and_a_planted_label_error_are_found() -> None:
    pictures, _ = draw_shapes(17, seed=0, image_size=32)
    # five cats, five dogs and five cats in other poses; of the test images, the second is a noisy copy of number 8
    train_labels, train_indices = torch.tensor([0] * 5 + [1] * 5 + [0] * 5), 2 * torch.arange(15)
    paths = [f"train/{i}.png" for i in range(15)]
    train = Split(pictures[:15], train_labels, train_indices, paths=paths)
    noise = torch.randint(-9, 10, pictures[8].shape, generator=torch.Generator().manual_seed(0))
    images = torch.stack([pictures[15], (pictures[8] + noise).clamp(0, 255).byte(), pictures[16]])
    split = Split(images, torch.tensor([0, 1, 0]), torch.tensor([3, 5, 7]))
    tested = evaluation(split.labels, split.indices, [0, 1, 1], [0.1, 0.7, 0.8])  # 0.8: a cat among dogs
    trained = evaluation(train_labels, train_indices, [0] * 5 + [1] * 5 + [2] * 5, [0.5] * 15)

    found, sections = analyze(tested, split, trained, train)
    assert sections["neighbors"].positions.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9]]
    (copy,) = found["near_duplicates"].pop("images")
    assert copy.pop("similarity") == pytest.approx(0.99, abs=0.01)
    assert copy == {
        "index": 5,
        "path": None,
        "true": "dog",
        "predicted": "dog",
        "probability": pytest.approx(0.7),
        "nearest_index": 16,
        "nearest_path": "train/8.png",
        "nearest_true": "dog",
    }
    assert found["near_duplicates"] == {"count": 1, "acc_with": 2 / 3, "acc_without": 0.5, "acc_on_doubtful": 1.0}
    (error,) = found["probable_label_errors"].pop("images")
    assert error == {
        "index": 7,
        "path": None,
        "true": "cat",
        "predicted": "dog",
        "probability": pytest.approx(0.8),
        "nearest_index": 10,
        "nearest_path": "train/5.png",
        "nearest_true": "dog",
        "similarity": 1.0,
    }
    assert found["probable_label_errors"] == {"count": 1, "acc_with": 2 / 3, "acc_without": 1, "acc_on_doubtful": 0}
    assert {gallery.key: gallery.positions.tolist() for gallery in sections["galleries"]} == {
        "near_duplicates": [1],
        "probable_label_errors": [2],
    }
