from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cifar10_tl.metrics.calibration import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)


def random_case(n: int = 400, k: int = 5, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(k, (n,), generator=generator)
    return scale * (torch.randn(n, k, generator=generator) + 1.2 * F.one_hot(labels, k)), labels


def test_calibration_error_and_bins_of_four_images_by_hand() -> None:
    # two images at 0.9 of which one is right, two at 0.6 of which both are: |0.5 - 0.9| / 2 + |1 - 0.6| / 2
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 0, 1])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.4)
    bins = reliability_bins(probabilities, labels)
    assert bins.counts.tolist() == [0] * 9 + [2, 0, 0, 0, 2, 0]  # 0.6 = 9 / 15 opens the tenth bin
    assert bins.confidence[9].item() == pytest.approx(0.6)
    assert bins.accuracy[[9, 13]].tolist() == [1.0, 0.5]
    assert bins.accuracy[0].isnan()


def test_the_bins_give_the_calibration_error() -> None:
    logits, labels = random_case()
    bins = reliability_bins(logits.softmax(1), labels)
    there = bins.counts > 0
    gaps = (bins.accuracy - bins.confidence).abs()[there]
    error = float((bins.counts[there] * gaps).sum() / len(labels))
    assert expected_calibration_error(logits.softmax(1), labels) == pytest.approx(error, abs=1e-6)


def test_a_probability_of_one_falls_into_the_last_bin() -> None:
    assert reliability_bins(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).counts[-1] == 1


def test_brier_score_is_that_of_the_definition() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    wanted = ((0.3**2 + 0.2**2 + 0.1**2) + (0.9**2 + 0.1**2 + 0.8**2)) / 2
    assert brier_score(probabilities, torch.tensor([0, 0])) == pytest.approx(wanted)


def test_temperature_of_two_classes_by_hand() -> None:
    # logits (2, 0), right in 3 of 4: softmax(2 / T) = 3 / 4, so T = 2 / log 3
    logits = torch.tensor([[2.0, 0.0]] * 4)
    labels = torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, labels) == pytest.approx(2 / torch.tensor(3.0).log().item(), rel=1e-6)


def test_no_other_temperature_has_a_smaller_loss() -> None:
    logits, labels = random_case()
    best = fit_temperature(logits, labels)
    losses = [F.cross_entropy(logits.double() / (best * factor), labels).item() for factor in (0.98, 1, 1.02)]
    assert losses[1] < min(losses[0], losses[2])
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * best)


def test_without_a_best_temperature_it_stops_at_a_bound() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(LOWEST_TEMPERATURE)
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(HIGHEST_TEMPERATURE)
