"""Selection: exact top-k under sinks, recent and budget, against a sort per row."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from butler_jax.selection.budget import beyond, budget_table, budget_tokens, slots
from butler_jax.selection.config import SelectionConfig
from butler_jax.selection.masks import Rows, choose, select, select_mask
from butler_jax.selection.top_k import ordered_bits, right_of_runs, top_mask
from pallas_kernels import select_top_k

jax.config.update("jax_numpy_rank_promotion", "raise")

masked = jax.jit(select_mask, static_argnames=("sinks", "recent"))


def sorted_choice(scores, allowed, own, start, tokens, sinks, recent):
    """The set of one row, by sorting: recent and sinks, then by score and position."""
    columns = [int(j) for j in np.flatnonzero(allowed)]
    forced = [j for j in columns if j > own - recent or start <= j < start + sinks]
    value = {j: -np.inf if np.isnan(scores[j]) else scores[j] for j in columns}
    rest = sorted(set(columns) - set(forced), key=lambda j: (-value[j], j))
    return {*forced, *rest[: max(min(tokens, len(columns)) - len(forced), 0)]}


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
    mask = masked(scores, allowed[:, None], Rows(own, start), tokens, sinks=2, recent=3)
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


@pytest.mark.parametrize("budget", [1 / 16, 0.5, 12])
def test_sinks_and_window_are_in_every_choice(budget):
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


@pytest.mark.parametrize("budget", [0.5, 0.1, 1 / 3, 1 / 16, 0.3, 1.0, 0.7])
@pytest.mark.parametrize(("sinks", "recent"), [(4, 8), (0, 1)])
def test_fraction_of_a_length_is_rounded_up_exactly_above_its_floor(budget, sinks, recent):
    ratio = Fraction(budget).limit_denominator(100)
    config = SelectionConfig(budget=budget, sinks=sinks, recent=recent)
    table = budget_table(config, 5000)
    np.testing.assert_array_equal(table, [min(max(ceil(ratio * n), sinks + recent), n) for n in range(5001)])
    assert budget_tokens(config, 10) == table[10] and budget_tokens(config, 1000) == ceil(ratio * 1000)


def test_integer_budget_is_a_number_of_tokens():
    table = budget_table(SelectionConfig(budget=64), 100)
    np.testing.assert_array_equal(table, np.minimum(np.arange(101), 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "above 0, got 0; give a fraction such as 0.25 or a number of tokens"),
        ({"budget": -0.5}, "above 0"),
        ({"budget": 1.5}, "at most 1.0"),
        ({"budget": 11}, "below 4 sinks"),
        ({"budget": 1}, "everything is 1.0"),
        ({"budget": float("nan")}, "above 0"),
        ({"budget": "half"}, "is not a number"),
        ({"sinks": 1.5}, "sinks must be a whole number, got 1.5"),
        ({"interval": 2.5}, "interval must be a whole number, got 2.5"),
        ({"threshold": 1.0}, r"one number for every layer and KV head, \[L\]\[K\]; got 1.0"),
        ({"budget": True}, "is not a number"),
        ({"sinks": -1}, "sinks"),
        ({"recent": 0}, "recent"),
        ({"unit": 3}, "power of two"),
        ({"unit": 0}, "power of two"),
        ({"unit": 16, "budget": 38}, "in pages of 16 = 39; give at least 39"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"min_context": -1}, "min_context"),
        ({"threshold": ((0.0, 1.0), (0.0,))}, "every layer and KV head"),
        ({"threshold": ()}, "every layer and KV head"),
    ],
)
def test_bad_budget_is_a_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**fields)


def test_numbers_of_numpy_are_numbers():
    config = SelectionConfig(budget=np.int64(256), sinks=np.int32(2), unit=np.int64(4))
    assert config == SelectionConfig(budget=256, sinks=2, unit=4) and isinstance(config.budget, int)


def paged_choice(scores, held, tokens, config, threshold=None, first=0):
    """The tokens of one row of `held` tokens, page by page in Python; those before `first` do not exist for it."""
    unit, seen = config.unit, range(first, held)
    value = {j: -np.inf if np.isnan(scores[j]) else scores[j] for j in seen}
    pages = {}
    for j in seen:
        pages.setdefault(j // unit, []).append(j)
    forced = {p for p, js in pages.items() if any(j < config.sinks or j >= held - config.recent for j in js)}
    everything = tokens >= len(seen)
    room = 0
    total = min(len(pages[(held - 1) // unit]), (held - 1) % unit + 1)
    while total <= tokens:  # whole pages beside the newest
        room, total = room + 1, total + unit
    room = len(pages) if everything else max(room, len(forced))
    order = sorted(set(pages) - forced, key=lambda p: (-max(value[j] for j in pages[p]), p))
    own = room - len(forced)
    if config.neighbours and not everything:
        own //= 2
    picked = order[: max(own, 0)]
    if threshold is not None:
        picked = [p for p in picked if max(value[j] for j in pages[p]) >= threshold]
    chosen = set(picked)
    if config.neighbours:
        for p in picked:  # the run that p belongs to, and its length
            low, high = p, p
            while low - 1 in picked:
                low -= 1
            while high + 1 in picked:
                high += 1
            if p + (high - low + 1) in pages:
                chosen.add(p + (high - low + 1))
    return {j for p in chosen | forced for j in pages[p]}


CASES = [
    dict(budget=0.4, sinks=2, recent=3),
    dict(budget=0.4, sinks=2, recent=3, unit=4),
    dict(budget=22, sinks=1, recent=6, unit=8),
    dict(budget=0.5, sinks=2, recent=3, neighbours=True),
    dict(budget=0.6, sinks=2, recent=3, unit=2, neighbours=True),
    dict(budget=0.7, sinks=2, recent=3, threshold=((0.0, 0.0), (0.3, -0.5))),
    dict(budget=0.7, sinks=2, recent=3, unit=2, neighbours=True, threshold=((0.0, 0.0), (0.3, -0.5))),
    dict(budget=1.0, unit=4, sinks=2, recent=3),
    dict(budget=0.3, sinks=2, recent=3, min_context=20),
]


@pytest.mark.parametrize("fields", CASES, ids=lambda f: "-".join(f"{k[:3]}{v}" for k, v in f.items())[:40])
@pytest.mark.parametrize("sliding", [None, 11])
def test_pages_thresholds_and_neighbours_equal_form_in_python(fields, sliding):
    config, S = SelectionConfig(**fields), 37
    random = np.random.default_rng(3)
    lengths = np.arange(1, S + 1, dtype=np.int32)
    scores = (random.integers(-6, 7, (S, 2, S)) / 7).astype(np.float32)  # many ties
    first = np.zeros_like(lengths) if sliding is None else np.maximum(lengths - sliding, 0)
    table = budget_table(config, S)
    tokens = table[lengths - first]
    threshold = None if config.threshold is None else jnp.asarray([config.threshold[1]] * S)
    room = slots(config, int(tokens.max()))
    pick = jax.jit(choose, static_argnames=("room", "config"))
    indices, valid = map(np.asarray, pick(scores, lengths, tokens, room, config, threshold=threshold, first=first))
    for row, head in np.ndindex(S, 2):
        limit = None if config.threshold is None else config.threshold[1][head]
        wanted = paged_choice(scores[row, head], lengths[row], tokens[row], config, limit, first[row])
        assert len(wanted) <= max(tokens[row], 1)
        units = indices[row, head][valid[row, head]]
        assert (np.diff(units) > 0).all() and not indices[row, head][~valid[row, head]].any()
        own = {j for u in units for j in range(u * config.unit, (u + 1) * config.unit)}
        assert own & set(range(first[row], lengths[row])) == wanted


@pytest.mark.parametrize("fields", CASES, ids=lambda f: "-".join(f"{k[:3]}{v}" for k, v in f.items())[:40])
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


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("sliding", [None, 11])
@pytest.mark.parametrize("fields", [dict(), dict(unit=4), dict(unit=2, threshold=((0.0, 0.0), (0.3, -0.5)))])
def test_kernels_choose_the_same(fields, sliding, implementation):
    config, S = SelectionConfig(budget=0.5, sinks=2, recent=5, **fields), 40
    random = np.random.default_rng(1)
    lengths = np.asarray([40, 1, 17, 23, 5, 32], np.int32)
    scores = jnp.asarray((random.integers(-3, 4, (6, 2, S)) / 7).astype(np.float32))
    first = None if sliding is None else jnp.asarray(np.maximum(lengths - sliding, 0))
    tokens = jnp.asarray(budget_table(config, S)[lengths - (0 if first is None else np.asarray(first))])
    threshold = None if config.threshold is None else jnp.asarray([config.threshold[1]] * 6)
    room = slots(config, 20)
    pick = partial(choose, scores, jnp.asarray(lengths), tokens, room, config, threshold=threshold, first=first)
    mine, theirs = pick(), pick(top_k=partial(select_top_k, implementation=implementation))
    np.testing.assert_array_equal(mine.indices, theirs.indices)
    np.testing.assert_array_equal(mine.valid, theirs.valid)


def test_a_run_of_c_brings_the_c_to_its_right():
    mask = np.zeros((1, 16), bool)
    mask[0, [1, 4, 5, 9, 10, 11, 12]] = True
    # {1} brings 2, {4, 5} bring 6 and 7, {9 ... 12} bring 13, 14, 15 and one beyond the end
    assert list(np.flatnonzero(right_of_runs(jnp.asarray(mask))[0])) == [2, 6, 7, 13, 14, 15]


def test_rows_up_to_min_context_attend_everything():
    config = SelectionConfig(budget=0.25, min_context=100)
    table = budget_table(config, 400)
    np.testing.assert_array_equal(table[:101], np.arange(101))
    assert table[101] == 26 and table[400] == 100
    found = beyond(100, jnp.asarray([100, 101]), jnp.asarray([0.5, 0.5]))
    assert np.isneginf(found[0]) and found[1] == 0.5
