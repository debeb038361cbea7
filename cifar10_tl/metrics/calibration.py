"""Whether probabilities mean what they say, and the temperature that mends them.

Source: Guo et al., "On calibration of modern neural networks" (2017), https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

NUM_BINS = 15


#: Where all predictions are right (or no better than chance), the likelihood has no maximum: it is looked for in here.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0


class ReliabilityBins(NamedTuple):
    """Predictions sorted by confidence into bins of equal width; NaN in empty ones. All of length B."""

    counts: Tensor  # int64, images
    confidence: Tensor  # float64, mean probability of the predicted class
    accuracy: Tensor  # float64, share of right predictions


def reliability_bins(probabilities: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> ReliabilityBins:
    """The bins of a reliability diagram, of probabilities float [N, K] and labels int64 [N]."""
    confidence, predictions = probabilities.max(1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)
    place = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, num_bins - 1)
    counts = torch.bincount(place, minlength=num_bins)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(place, values.double(), minlength=num_bins) / counts

    return ReliabilityBins(counts, mean(confidence), mean(predictions == labels))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> float:
    """Mean distance of confidence and accuracy over the bins, weighted by their images (Guo et al., equation 3)."""
    return float(multiclass_calibration_error(probabilities, labels, probabilities.shape[1], num_bins, norm="l1"))


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean squared distance from the one-hot label, summed over the classes, in [0, 2].

    Source: G. W. Brier, "Verification of forecasts expressed in terms of probability" (1950).
    """
    one_hot = F.one_hot(labels, probabilities.shape[1])
    return float((probabilities.double() - one_hot).square().sum(1).mean())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T for which softmax(logits / T) has the smallest loss (Guo et al., section 4.2).

    The loss is convex in 1 / T, so the sign of its slope tells on which side the minimum lies: bisection finds it.

    Args:
        logits: float [N, K], of images that the network did not learn from.
        labels: int64 [N].
    """
    logits = logits.double()
    true = logits.gather(1, labels[:, None]).squeeze(1)
    low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE
    for _ in range(60):
        temperature = (low * high) ** 0.5
        expected = ((logits / temperature).softmax(1) * logits).sum(1)
        slope = (expected - true).mean()  # of the loss, in 1 / temperature
        low, high = (temperature, high) if slope > 0 else (low, temperature)
    return (low * high) ** 0.5
