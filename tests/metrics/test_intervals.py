from __future__ import annotations

import math

import pytest

from cifar10_tl.metrics.intervals import Spread, further_pairs, spread, t_quantile, wilson_interval


@pytest.mark.parametrize(
    ("num_correct", "count", "low", "high"),
    [  # R. G. Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_published_values(num_correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(num_correct, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson_interval(count - num_correct, count)
    assert mirrored == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_wilson_interval_ends_at_exactly_zero_and_one() -> None:
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


def test_t_quantile_against_the_table() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 10: 2.22814, 30: 2.04227, 100: 1.98397}
    assert {n: t_quantile(n) for n in table} == pytest.approx(table, rel=5e-6)


def test_spread_of_three_values_by_hand() -> None:
    of = spread([0.90, 0.92, 0.94])
    assert (of.n, of.mean, of.deviation) == (3, pytest.approx(0.92), pytest.approx(0.02))
    half = 4.30265 * 0.02 / math.sqrt(3)
    assert (of.low, of.high) == (pytest.approx(0.92 - half), pytest.approx(0.92 + half))


def test_one_value_has_no_spread() -> None:
    assert spread([0.5]) == pytest.approx((1, 0.5, math.nan, math.nan, math.nan), nan_ok=True)


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_pairs_for_a_power_of_80_percent_against_the_exact_numbers(effect: float, pairs: int) -> None:
    """The exact numbers of the paired t test (two-sided, 5%) are those of G*Power."""
    assert further_pairs(Spread(3, effect, 1.0, -1.0, 9.0)) == pairs - 3
    assert further_pairs(Spread(3, -effect, 1.0, -9.0, 1.0)) == pairs - 3


def test_a_settled_difference_needs_no_more_pairs_and_none_at_all_is_never_settled() -> None:
    assert further_pairs(spread([0.01, 0.011, 0.012])) == 0
    assert further_pairs(spread([-0.01, -0.01])) == 0
    assert further_pairs(spread([0.01, -0.01])) is None
    assert further_pairs(spread([0.2 - 0.3, 0.2 - 0.1])) is None, "up to rounding"
    assert further_pairs(spread([0.01])) is None
    assert further_pairs(Spread(9, 1.0, 1.0, -0.1, 2.1)) == 1
