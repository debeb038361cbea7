"""Confidence intervals of an accuracy and of the mean of several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = statistics.NormalDist().inv_cdf(0.975)


def wilson_interval(num_correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy, which stays within [0, 1] and is valid near both ends.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    fraction, shrink = num_correct / count, 1 + _Z**2 / count
    middle = (fraction + _Z**2 / (2 * count)) / shrink
    half = _Z / shrink * math.sqrt(fraction * (1 - fraction) / count + _Z**2 / (4 * count**2))
    # The formula is exactly 0 or 1 at the ends, except for rounding.
    return (0.0 if num_correct == 0 else middle - half), (1.0 if num_correct == count else middle + half)


class Spread(NamedTuple):
    """Mean and standard deviation of n values, and the 95 % interval of the mean; NaN if n is 1."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the mean, the sample standard deviation and the 95 % interval of Student's t."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Spread(1, mean, math.nan, math.nan, math.nan)
    deviation = statistics.stdev(values)
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Spread(n, mean, deviation, mean - half, mean + half)


def t_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t with ``degrees`` degrees of freedom, by integrating its density."""
    t, step = np.linspace(0, 13, 130_001, retstep=True)
    density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    density *= math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    cdf = 0.5 + step * (np.cumsum(density) - (density[0] + density) / 2)  # trapezoidal rule
    return float(np.interp(0.975, cdf, t))
