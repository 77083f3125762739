"""Standard errors against resampling and the Wilson interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from butler_jax.simulation.statistics import Estimate, estimate_ratio, estimate_share


def test_a_ratios_error_is_that_of_resampled_sequences():
    random = np.random.default_rng(0)
    counts = random.integers(5, 50, 200)
    sums = counts * 2.0 + random.normal(size=200) * counts
    found = estimate_ratio(sums, counts)
    drawn = random.integers(0, 200, (4000, 200))
    resampled = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert found.value == pytest.approx(sums.sum() / counts.sum()) and found.n == counts.sum()
    assert found.error == pytest.approx(resampled.std(), rel=0.05)  # 4,000 draws: 1.1 % of themselves


def test_an_estimate_of_one_sequence_has_no_error_and_of_none_no_value():
    assert estimate_ratio(np.array([3.0, 0.0]), np.array([2, 0])) == Estimate(1.5, None, 2, 1)
    assert Estimate(math.log(2), 0.1, 5, 3).exp() == pytest.approx((2, 0.2, 5, 3))
    assert Estimate(math.log(2), 0.1, 5, 3).expm1() == pytest.approx((1, 0.2, 5, 3))
    assert Estimate(1000.0, None, 5, 1).exp() == Estimate(math.inf, None, 5, 1)
    with pytest.raises(ValueError, match="nothing to take a mean of"):
        estimate_ratio(np.array([0.0]), np.array([0]))


@pytest.mark.parametrize("count", [2, 4, 20, 500])
def test_where_all_samples_agree_the_error_is_the_reach_of_the_wilson_interval(count):
    # The ends p of the interval of one standard error solve (found - p)^2 = p (1 - p) / n.
    for found in (0, 1):
        ends = np.roots([1 + 1 / count, -(2 * found + 1 / count), found**2])
        error = estimate_share(np.full(count, found), np.ones(count)).error
        assert error == pytest.approx(np.abs(ends - found).max(), abs=1e-9)
    some = np.arange(count) < 1
    assert (
        estimate_share(some, np.ones(count)) == estimate_ratio(some, np.ones(count))
        and estimate_share([1.0], [1]).error is None
    )
