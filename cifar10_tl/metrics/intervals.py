"""How sure a number is: intervals of an accuracy, and of the mean of a few runs. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

_Z = statistics.NormalDist().inv_cdf(0.975)


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of which ``right`` of ``count`` were seen.

    It stays inside [0, 1], and holds near both ends, unlike the one from the normal distribution.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Raises:
        ValueError: nothing was counted, or more right than counted.
    """
    if not 0 <= right <= count or not count:
        raise ValueError(f"{right} right of {count}")
    share, shrink = right / count, 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / shrink
    half = _Z / shrink * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # at the ends the formula gives exactly 0 or 1, but for rounding
    return (0.0 if right == 0 else middle - half), (1.0 if right == count else middle + half)


class Spread(NamedTuple):
    """Mean of n values, their standard deviation, and the 95 % interval of the mean; NaN where n is 1."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation (with n - 1) and the 95 % interval of Student's t.

    Raises:
        ValueError: there are no values.
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
    """The value that Student's t stays below with ``probability``, in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return high


def _t_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t, t >= 0; source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
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
