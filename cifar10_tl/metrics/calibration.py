"""Calibration metrics and temperature scaling.

Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 15


class ReliabilityBins(NamedTuple):
    """B bins of predictions, of equal width in confidence; means of empty bins are NaN."""

    counts: Tensor  # number of images, int64 [B]
    confidence: Tensor  # mean probability of the predicted class, float64 [B]
    accuracy: Tensor  # fraction of correct predictions, float64 [B]


def reliability_bins(probabilities: Tensor, labels: Tensor) -> ReliabilityBins:
    """Return the bins of a reliability diagram for probabilities, float [N, K], and labels, int64 [N]."""
    confidence, predictions = probabilities.max(1)
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=confidence.dtype)
    bins = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, NUM_BINS - 1)
    counts = torch.bincount(bins, minlength=NUM_BINS)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(bins, values.double(), minlength=NUM_BINS) / counts

    return ReliabilityBins(counts, mean(confidence), mean(predictions == labels))


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean squared distance of the probabilities from the one-hot labels, in [0, 2].

    Source: G. W. Brier, "Verification of Forecasts Expressed in Terms of Probability" (1950).
    """
    one_hot = F.one_hot(labels, probabilities.shape[1])
    return float((probabilities.double() - one_hot).square().sum(1).mean())


def expected_calibration_error(bins: ReliabilityBins) -> float:
    """Return the mean distance of confidence and accuracy over the images (Guo et al., equation 3)."""
    gaps = (bins.confidence - bins.accuracy).abs()
    return float((bins.counts * gaps)[bins.counts > 0].sum() / bins.counts.sum())


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature T that minimizes the loss of softmax(logits / T) (Guo et al., section 4.2).

    Return None if there is no minimum from 0.05 to 20, as with few images whose predictions are all correct.

    The loss is convex in 1 / T, so the minimum is found by bisection on the sign of its slope. The ``logits``, float
    [N, K], should be of images that were not used for training.
    """
    logits = logits.double()
    true = logits.gather(1, labels[:, None]).squeeze(1)
    lowest, highest = low, high = 0.05, 20.0
    for _ in range(60):
        temperature = (low * high) ** 0.5
        expected = ((logits / temperature).softmax(1) * logits).sum(1)
        slope = (expected - true).mean()  # of the loss, in 1 / temperature
        low, high = (temperature, high) if slope > 0 else (low, temperature)
    return None if low == lowest or high == highest else (low * high) ** 0.5
