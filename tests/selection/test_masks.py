"""Selection: exact top-k under sinks, recent and budget, against a sort per row."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from butler_jax.selection import Rows, SelectionConfig, best_in_unit, budget_table, select_mask, tied_share
from tests.selection.definitions import CASES, IDS, paged_choice, select, sorted_choice

masked = jax.jit(select_mask, static_argnames="config")


# One compiled shape for all draws; documents, own columns and budgets vary inside it.
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([1, 2, 5, 1000]),
    special=st.booleans(),
    sliding=st.sampled_from([None, 3, 9]),
)
def test_chosen_set_equals_sort(seed, levels, special, sliding):
    B, K, C, S = 2, 2, 3, 24
    random = np.random.default_rng(seed)
    scores = random.integers(-levels, levels + 1, (B, K, C, S)).astype(np.float32) / 7
    if special:
        values = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, -1e-45], np.float32)
        where = random.random(scores.shape) < 0.5
        scores[where] = random.choice(values, where.sum())
    own = random.integers(0, S, (B, C)).astype(np.int32)
    start = (own * random.random((B, C))).astype(np.int32)
    tokens = random.integers(2 + 3, S + 1, (B, C)).astype(np.int32)
    columns = np.arange(S)
    allowed = (columns <= own[..., None]) & (columns >= start[..., None])
    if sliding:
        allowed &= columns > own[..., None] - sliding
    mask = masked(scores, allowed[:, None], Rows(own, start), tokens, SelectionConfig(sinks=2, recent=3))
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
    mask = jax.jit(select, static_argnums=3)(scores, allowed, Rows(own, np.zeros_like(own)), config)
    mask = np.asarray(mask)
    assert not (mask & ~allowed).any()
    # half of t + 1 keys, but 4 sinks and a recent of 8 at least, where there are so many
    wanted = [min(max(ceil(Fraction(1, 2) * n), 12), n) for n in range(1, 41)]
    np.testing.assert_array_equal(mask.sum(-1)[0, 0], wanted)


@pytest.mark.parametrize("budget", [1 / 16, 0.5, 12])
def test_sinks_and_recent_are_in_every_choice(budget):
    own = np.arange(64, dtype=np.int32)[None]
    start = np.where(own < 20, 0, 20).astype(np.int32)  # two documents in a row
    columns = np.arange(64)
    allowed = (columns <= own[..., None]) & (columns >= start[..., None])
    # the scores would have none of them
    scores = np.where((columns % 7) == 3, 1.0, -1.0).astype(np.float32) * np.ones((1, 1, 64, 1), np.float32)
    mask = np.asarray(
        jax.jit(select, static_argnums=3)(scores, allowed[:, None], Rows(own, start), SelectionConfig(budget=budget))
    )
    for t in range(64):
        first = 0 if t < 20 else 20
        wanted = {*range(first, min(first + 4, t + 1)), *range(max(first, t - 7), t + 1)}
        assert wanted <= set(np.flatnonzero(mask[0, 0, t])) <= set(range(first, t + 1))


@pytest.mark.parametrize("fields", CASES, ids=IDS)
def test_mask_of_packed_documents_is_the_choice_of_each_newest_token(fields):
    config, S = SelectionConfig(**fields), 44
    starts = np.asarray([0] * 21 + [21] * 23)  # pages are counted from a document's start
    own = np.arange(S, dtype=np.int32)
    random = np.random.default_rng(5)
    scores = (random.integers(-6, 7, (1, 2, S, S)) / 7).astype(np.float32)
    allowed = (own[None] <= own[:, None]) & (own[None] >= starts[:, None])
    threshold = None if config.threshold is None else jnp.asarray(config.threshold[1])[None, :, None]
    rows = Rows(own[None], starts[None].astype(np.int32))
    mask = jax.jit(select, static_argnums=3)(scores, allowed[None, None], rows, config, threshold)
    table = budget_table(config, S)
    for t, head in np.ndindex(S, 2):
        held = t + 1 - starts[t]
        limit = None if config.threshold is None else config.threshold[1][head]
        wanted = paged_choice(scores[0, head, t, starts[t] :], held, table[held], config, limit)
        assert set(np.flatnonzero(mask[0, head, t]) - starts[t]) == wanted


@pytest.mark.parametrize("unit", [1, 4])
def test_a_token_counts_as_the_best_of_its_unit(unit):
    size, start = 44, 3
    config, own = SelectionConfig(sinks=2, recent=3, unit=unit), np.arange(size, dtype=np.int32)
    scores = np.random.default_rng(1).normal(size=(1, 2, size, size)).astype(np.float32)
    scores[0, 0, :, 7] = np.nan
    allowed = (own[None] <= own[:, None]) & (own[None] >= start)
    rows = Rows(own[None], np.full((1, size), start, np.int32))
    found = jax.jit(best_in_unit, static_argnums=3)(scores, allowed[None, None], rows, config)
    for head, t in np.ndindex(2, size):
        for first in range(start, t + 1, unit):
            page = np.arange(first, min(first + unit, t + 1))
            always = (page < start + 2).any() or (page > t - 3).any()
            best = np.inf if always else np.nan_to_num(scores[0, head, t, page], nan=-np.inf).max()
            np.testing.assert_array_equal(found[0, head, t, page], best)


@pytest.mark.parametrize("unit", [1, 4])
def test_the_share_of_ties_counts_what_position_settled(unit):
    """Sinks 0 and 1, the newest 3, and five more units of which position tells three from their equals."""
    config = SelectionConfig(sinks=2 * unit, recent=3 * unit, unit=unit)
    scores = np.repeat([0, 0, 9, 8, 5, 5, 5, 5, 1, 0, 0, 0], unit).astype(np.float32)
    size = len(scores)
    rows = Rows(np.full((1, 3), size - 1, np.int32), np.zeros((1, 3), np.int32))
    allowed, tokens = np.ones((1, 1, 3, size), bool), unit * np.asarray([[10, 9, 12]], np.int32)
    scores = np.broadcast_to(scores, (1, 1, 3, size)).copy()
    scores[0, 0, 1] = np.arange(size)[::-1]  # no ties

    def both(scores):
        mask = select_mask(scores, allowed, rows, tokens, config)
        return mask, tied_share(mask, scores, allowed, rows, config)

    every = dataclasses.replace(config, interval=2)
    assert not tied_share(select_mask(scores, allowed, rows, tokens, config), scores, allowed, rows, every).any()
    mask, share = jax.jit(both)(scores)
    assert np.flatnonzero(mask[0, 0, 0, ::unit]).tolist() == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]
    np.testing.assert_allclose(share[0, 0], [3 / 10, 0, 0], rtol=1e-6)  # the last row reads everything
