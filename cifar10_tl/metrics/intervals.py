"""Confidence intervals of an accuracy and of the mean of several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

_Z = statistics.NormalDist().inv_cdf(0.975)


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy for ``right`` correct predictions of ``count``.

    Unlike the normal approximation, it stays within [0, 1] and is valid near both ends.
    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).

    Raises:
        ValueError: ``count`` is zero, or ``right`` is not in [0, count].
    """
    if not 0 <= right <= count or not count:
        raise ValueError(f"{right} right of {count}")
    share, shrink = right / count, 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / shrink
    half = _Z / shrink * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # The formula is exactly 0 or 1 at the ends, except for rounding.
    return (0.0 if right == 0 else middle - half), (1.0 if right == count else middle + half)


class Spread(NamedTuple):
    """Mean and standard deviation of n values, and the 95 % interval of the mean; NaN if n is 1."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the mean, the sample standard deviation and the 95 % interval of Student's t.

    Raises:
        ValueError: ``values`` is empty.
    """
    if not values:
        raise ValueError("no values")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Spread(1, mean, math.nan, math.nan, math.nan)
    deviation = statistics.stdev(values)
    half = t_quantile(0.975, n - 1) * deviation / math.sqrt(n)
    return Spread(n, mean, deviation, mean - half, mean + half)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t at ``probability`` in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return high


def _t_cdf(t: float, degrees: int) -> float:
    """Return the CDF of Student's t for t >= 0 (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if not odd:
        return 0.5 + 0.5 * math.sin(angle) * total
    series = math.sin(angle) * total if degrees > 1 else 0.0
    return 0.5 + (angle + series) / math.pi
