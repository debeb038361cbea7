from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cifar10_tl.metrics.calibration import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)


def test_bins_of_five_images_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [1.0, 0.0]])
    bins = reliability_bins(probabilities, torch.tensor([0, 1, 0, 1, 0]))
    assert bins.counts.tolist() == [0] * 9 + [2, 0, 0, 0, 2, 1]  # 0.6 = 9 / 15 opens the tenth bin
    assert bins.confidence[9].item() == pytest.approx(0.6)
    assert bins.accuracy[[9, 13, 14]].tolist() == [1.0, 0.5, 1.0]
    assert bins.accuracy[0].isnan()
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.4 + 2 * 0.4 + 1 * 0) / 5)
    broken = reliability_bins(torch.full((2, 2), math.nan), torch.tensor([0, 1]))
    assert math.isnan(expected_calibration_error(broken))


def test_brier_score_is_that_of_the_definition() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    expected = ((0.3**2 + 0.2**2 + 0.1**2) + (0.9**2 + 0.1**2 + 0.8**2)) / 2
    assert brier_score(probabilities, torch.tensor([0, 0])) == pytest.approx(expected)


def test_temperature_of_two_classes_by_hand() -> None:
    # logits (2, 0), correct in 3 of 4: softmax(2 / T) = 3 / 4, so T = 2 / log 3
    assert fit_temperature(torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])) == pytest.approx(2 / math.log(3))


def test_no_other_temperature_has_a_smaller_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(5, (400,), generator=generator)
    logits = 2.0 * (torch.randn(400, 5, generator=generator) + 1.2 * F.one_hot(labels, 5))
    best = fit_temperature(logits, labels)
    assert best is not None
    losses = [F.cross_entropy(logits.double() / (best * factor), labels).item() for factor in (0.98, 1, 1.02)]
    assert losses[1] < min(losses[0], losses[2])
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * best)


@pytest.mark.parametrize("labels", [[0, 1], [1, 0]])
def test_there_is_no_best_temperature_if_all_predictions_are_correct_or_none_is(labels: list[int]) -> None:
    assert fit_temperature(torch.tensor([[5.0, 0.0], [0.0, 5.0]]), torch.tensor(labels)) is None
    assert fit_temperature(torch.full((2, 2), math.nan), torch.tensor(labels)) is None
