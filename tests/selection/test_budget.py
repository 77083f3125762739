"""Budgets in tokens of rows of every length."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.selection import SelectionConfig, beyond, budget_table, limits_of
from tests.tiny_models import BASE


@pytest.mark.parametrize("budget", [0.5, 0.1, 1 / 3, 1 / 16, 0.3, 1.0, 0.7])
@pytest.mark.parametrize(("sinks", "recent"), [(4, 8), (0, 1)])
def test_fraction_of_a_length_is_rounded_up_exactly_above_its_floor(budget, sinks, recent):
    ratio = Fraction(budget).limit_denominator(100)
    config = SelectionConfig(budget=budget, sinks=sinks, recent=recent)
    table = budget_table(config, 5000)
    np.testing.assert_array_equal(table, [min(max(ceil(ratio * n), sinks + recent), n) for n in range(5001)])
    assert budget_table(config, 10)[10] == table[10] and table[1000] == ceil(ratio * 1000)


def test_integer_budget_is_a_number_of_tokens():
    table = budget_table(SelectionConfig(budget=64), 100)
    np.testing.assert_array_equal(table, np.minimum(np.arange(101), 64))


@pytest.mark.parametrize(("layers", "heads"), [(2, 2), (BASE.layers, 4)])
def test_thresholds_of_another_model_or_policy_are_refused(layers, heads):
    config = SelectionConfig(threshold=((0.5,) * heads,) * layers)
    with pytest.raises(ValueError, match=r"do not fit a model of .* and a policy that chooses for 2 heads in each"):
        limits_of(config, BASE, 40, 2)


def test_rows_up_to_min_context_attend_everything():
    config = SelectionConfig(budget=0.25, min_context=100)
    table = budget_table(config, 400)
    np.testing.assert_array_equal(table[:101], np.arange(101))
    assert table[101] == 26 and table[400] == 100
    assert limits_of(dataclasses.replace(config, min_context=10**12), BASE, 400, 2).min_context == 400
    found = beyond(100, jnp.asarray([100, 101]), jnp.asarray([0.5, 0.5]))
    assert np.isneginf(found[0]) and found[1] == 0.5
