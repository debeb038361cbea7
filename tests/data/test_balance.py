from __future__ import annotations

import pytest
import torch

from cifar10_tl.data.balance import balanced_order, class_weights

LABELS = torch.tensor([0] * 60 + [2] * 30 + [3] * 6)[torch.randperm(96, generator=torch.Generator().manual_seed(5))]


def order(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return balanced_order(len(labels), labels, torch.Generator().manual_seed(seed))


def test_weights_are_inversely_proportional_to_the_classes_with_mean_1() -> None:
    weights = class_weights(LABELS, 5)
    assert weights[[0, 2, 3]].tolist() == pytest.approx([96 / 180, 96 / 90, 96 / 18])
    assert weights[LABELS].mean() == pytest.approx(1)
    assert weights.isfinite().all(), "also of classes without an image"
    assert class_weights(torch.arange(40) % 4, 4).tolist() == [1, 1, 1, 1]


def test_each_class_is_drawn_equally_often_and_its_images_in_turn() -> None:
    drawn = order(LABELS)
    positions, repetitions = drawn % 96, drawn // 96
    assert torch.bincount(LABELS[positions]).tolist() == [32, 0, 32, 32]
    assert len(drawn.unique()) == 96
    times = torch.bincount(positions, minlength=96)
    assert times[LABELS == 0].unique().tolist() == [0, 1]
    assert (times[LABELS == 2] == 2).sum() == 2
    assert sorted(times[LABELS == 3].tolist()) == [5, 5, 5, 5, 6, 6]
    for position in positions.unique():
        assert sorted(repetitions[positions == position].tolist()) == list(range(int(times[position])))
    assert not torch.equal(order(LABELS, seed=1), drawn)
    quarters = [torch.bincount(LABELS[part], minlength=4)[[0, 2, 3]] for part in positions.split(24)]
    assert torch.stack(quarters).min() >= 3, "not sorted by class"


def test_the_remainder_goes_to_another_class_in_another_epoch() -> None:
    counts = torch.stack([torch.bincount(LABELS[1:][order(LABELS[1:], seed) % 95])[[0, 2, 3]] for seed in range(20)])
    assert counts.sum(1).unique().tolist() == [95]
    assert {tuple(row.tolist()) for row in counts} == {(32, 32, 31), (32, 31, 32), (31, 32, 32)}
