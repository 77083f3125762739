"""Selection: exact top-k under sinks, window and budget, against a sort per row."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from butler_jax.configs import SelectionConfig
from butler_jax.selection import (
    Rows,
    budget_table,
    budget_tokens,
    ordered_bits,
    select,
    select_mask,
    top_mask,
)

jax.config.update("jax_numpy_rank_promotion", "raise")

choose = jax.jit(select_mask, static_argnames=("sinks", "window"))


def sorted_choice(scores, allowed, own, start, tokens, sinks, window):
    """The set of one row, by sorting: newest, then sinks, then by score and position."""
    columns = np.flatnonzero(allowed)
    tokens = min(tokens, len(columns))
    newest = min(tokens, window)
    forced = [j for j in columns if j > own - newest]
    forced += [j for j in columns if j not in forced and start <= j < start + min(sinks, tokens - newest)]
    rest = [j for j in columns if j not in forced]
    value = {j: -np.inf if np.isnan(scores[j]) else scores[j] for j in rest}
    rest.sort(key=lambda j: (-value[j], j))
    return set(forced) | set(rest[: tokens - len(forced)])


# One compiled shape for all draws; documents, own columns and budgets vary inside it.
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([1, 2, 5, 1000]),
    special=st.booleans(),
    sliding=st.sampled_from([None, 3, 9]),
)
def test_chosen_set_equals_sort(seed, levels, special, sliding):
    B, K, C, S = 2, 2, 3, 24  # noqa: N806
    random = np.random.default_rng(seed)
    scores = random.integers(-levels, levels + 1, (B, K, C, S)).astype(np.float32) / 7
    if special:
        values = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, -1e-45], np.float32)
        where = random.random(scores.shape) < 0.5
        scores[where] = random.choice(values, where.sum())
    own = random.integers(0, S, (B, C)).astype(np.int32)
    start = (own * random.random((B, C))).astype(np.int32)
    tokens = random.integers(1, S + 1, (B, C)).astype(np.int32)
    columns = np.arange(S)
    allowed = (columns <= own[..., None]) & (columns >= start[..., None])
    if sliding:
        allowed &= columns > own[..., None] - sliding
    mask = choose(scores, allowed[:, None], Rows(own, start), tokens, sinks=2, window=3)
    # Denormals may be flushed to zero by the compiled comparison of floats; the oracle is given the same.
    flushed = np.where(np.abs(scores) < 1e-38, np.float32(0), scores)
    for b, k, c in np.ndindex(B, K, C):
        wanted = sorted_choice(flushed[b, k, c], allowed[b, c], own[b, c], start[b, c], tokens[b, c], 2, 3)
        assert set(np.flatnonzero(mask[b, k, c])) == wanted


def test_chosen_set_stays_inside_allowed_and_counts_exactly():
    random = np.random.default_rng(0)
    scores = np.full((1, 1, 40, 40), -np.inf, np.float32)
    scores[..., ::3] = random.normal(size=scores[..., ::3].shape)
    own = np.arange(40, dtype=np.int32)[None]
    allowed = np.tri(40, dtype=bool)[None, None]
    config = SelectionConfig(budget=0.5)
    mask = np.asarray(select(jnp.asarray(scores), jnp.asarray(allowed), Rows(own, np.zeros_like(own)), config))
    assert not (mask & ~allowed).any()
    np.testing.assert_array_equal(mask.sum(-1)[0, 0], [ceil(Fraction(1, 2) * (t + 1)) for t in range(40)])


def test_order_of_float32_is_kept_by_its_unsigned_image():
    values = np.array([-np.inf, -3e38, -1.0, -1e-30, 0.0, 1e-30, 1.0, 3e38, np.inf], np.float32)
    bits = np.asarray(ordered_bits(jnp.asarray(values)))
    assert (np.diff(bits.astype(np.int64)) > 0).all()
    signed, missing = np.asarray(ordered_bits(jnp.asarray([-0.0, 0.0, np.nan, -np.inf], jnp.float32))).reshape(2, 2)
    assert signed[0] == signed[1] and missing[0] == missing[1]


def test_ties_go_to_the_earlier_token():
    image = jnp.asarray([[5, 7, 5, 5, 1, 5]], jnp.uint32)
    for count, wanted in ((0, []), (1, [1]), (2, [0, 1]), (4, [0, 1, 2, 3]), (6, range(6))):
        mask = top_mask(image, jnp.asarray([count]))
        assert list(np.flatnonzero(mask[0])) == list(wanted)


def test_short_rows_attend_newest_then_sinks():
    own = np.arange(20, dtype=np.int32)[None]
    rows, allowed = Rows(own, np.zeros_like(own)), np.tri(20, dtype=bool)[None, None]
    scores = np.zeros((1, 1, 20, 20), np.float32)
    for tokens in (1, 3, 5, 6):  # 4 sinks and a window of 8 do not fit
        mask = choose(scores, allowed, rows, np.full((1, 20), tokens, np.int32), sinks=4, window=3)[0, 0]
        newest = min(tokens, 3)
        wanted = {*range(19, 19 - newest, -1), *range(tokens - newest)}
        assert set(np.flatnonzero(mask[19])) == wanted


@pytest.mark.parametrize("budget", [0.5, 0.1, 1 / 3, 1 / 16, 0.3, 1.0, 0.7])
def test_fraction_of_a_length_is_rounded_up_exactly(budget):
    ratio = Fraction(budget).limit_denominator(100)
    table = budget_table(SelectionConfig(budget=budget), 5000)
    np.testing.assert_array_equal(table, [ceil(ratio * n) for n in range(5001)])
    assert budget_tokens(SelectionConfig(budget=budget), 10) == ceil(ratio * 10)


def test_integer_budget_is_a_number_of_tokens():
    table = budget_table(SelectionConfig(budget=64), 100)
    np.testing.assert_array_equal(table, np.minimum(np.arange(101), 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "above 0"),
        ({"budget": -0.5}, "above 0"),
        ({"budget": 1.5}, "at most 1.0"),
        ({"budget": 11}, "below 4 sinks"),
        ({"budget": 1}, "everything is 1.0"),
        ({"budget": float("nan")}, "above 0"),
        ({"budget": "half"}, "must be a number"),
        ({"budget": True}, "must be a number"),
        ({"sinks": -1}, "sinks"),
        ({"window": 0}, "window"),
    ],
)
def test_bad_budget_is_a_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**fields)
