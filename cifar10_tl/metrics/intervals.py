"""Confidence intervals of an accuracy and of the mean of several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z, _Z_POWER = map(statistics.NormalDist().inv_cdf, (0.975, 0.8))


def wilson_interval(num_correct: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of an accuracy, which stays within [0, 1] and is valid near both ends.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    fraction, shrink = num_correct / count, 1 + _Z**2 / count
    middle = (fraction + _Z**2 / (2 * count)) / shrink
    half = _Z / shrink * math.sqrt(fraction * (1 - fraction) / count + _Z**2 / (4 * count**2))
    # The formula is exactly 0 or 1 at the ends, except for rounding.
    return (0.0 if num_correct == 0 else middle - half), (1.0 if num_correct == count else middle + half)


class Spread(NamedTuple):
    """Mean and standard deviation of n values, and the 95% interval of the mean; NaN if n is 1."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the mean, the sample standard deviation and the 95% interval of Student's t."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Spread(1, mean, math.nan, math.nan, math.nan)
    deviation = statistics.stdev(values)
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Spread(n, mean, deviation, mean - half, mean + half)


def further_pairs(difference: Spread) -> int | None:
    """Return how many more pairs are needed for significance, 0 if the interval excludes 0, None if unknown.

    With n = (z_0.975 + z_0.8)^2 (deviation / mean)^2 + z_0.975^2 / 2 pairs, such a difference is significant at the 5%
    level with a power of 80%. Source: W. C. Guenther, "Sample size formulas for normal theory t tests", The American
    Statistician 35 (1981).
    """
    if difference.n == 1 or abs(difference.mean) < 1e-9:  # equal up to rounding
        return None
    if difference.low > 0 or difference.high < 0:
        return 0
    needed = ((_Z + _Z_POWER) * difference.deviation / difference.mean) ** 2 + _Z**2 / 2
    return max(1, math.ceil(needed) - difference.n)


def t_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t with ``degrees`` degrees of freedom, by integrating its density."""
    t, step = np.linspace(0, 13, 130_001, retstep=True)
    density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    density *= math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    cdf = 0.5 + step * (np.cumsum(density) - (density[0] + density) / 2)  # trapezoidal rule
    return float(np.interp(0.975, cdf, t))
