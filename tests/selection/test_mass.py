"""Top-p against sorting and cumulating in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.selection import Rows, SelectionConfig, select_mask, weigh_units

B, K, C, S, SINKS, RECENT = 2, 2, 5, 40, 2, 3
CLOSE = 1e-5  # float32 sums of 40 weights are off by less


def nucleus(weights, own, start, first, unread, unit):
    """The tokens of one row: units that hold sinks or recent tokens, and the heaviest others until 1 - unread is read.

    weights: of tokens first ... own, float64. Units count from `start`.
    """
    pages = {}
    for column in range(first, own + 1):
        pages.setdefault((column - start) // unit, []).append(column)
    always = [p for p, js in pages.items() if any(j < start + SINKS or j > own - RECENT for j in js)]
    mass = {p: sum(weights[j] for j in js) for p, js in pages.items()}
    chosen, read = list(always), 1 - sum(mass[p] for p in pages if p not in always)
    for page in sorted(set(pages) - set(always), key=lambda p: -mass[p]):
        if 1 - read <= unread:
            break
        chosen, read = [*chosen, page], read + mass[page]
    return {j for p in chosen for j in pages[p]}


def draw(sliding=None):
    """Logarithms of weights whose sums are 1 over what rows of two documents may see."""
    random = np.random.default_rng(0)
    own = np.stack([np.arange(S - C, S), np.arange(S - C, S) - 4]).astype(np.int32)
    start = np.stack([np.zeros(C), np.full(C, 5)]).astype(np.int32)
    first = start if sliding is None else np.maximum(start, own - sliding + 1)
    columns = np.arange(S)
    allowed = (columns <= own[..., None]) & (columns >= first[..., None])
    weights = np.where(allowed[:, None], np.exp(3 * random.normal(size=(B, K, C, S))), 0.0)
    return weights / weights.sum(-1, keepdims=True), allowed[:, None], Rows(own, start), first


def choose(weights, allowed, rows, unread, config, most=S):
    """The mask under top-p. unread: of every row and head; most: what the budget has room for."""

    @jax.jit
    def run(scores, allowed, rows, unread):
        weighed = weigh_units(scores, allowed, rows, config)
        tokens = jnp.minimum(allowed.sum(-1)[:, 0], most)
        return select_mask(weighed.scores, allowed, rows, tokens, config, threshold=weighed.threshold(unread))

    with np.errstate(divide="ignore"):
        scores, unread = np.log(np.float32(weights)), np.log(np.float32(unread))
    return np.asarray(run(scores, allowed, rows, unread))


@pytest.mark.parametrize(("unit", "sliding"), [(1, None), (4, None), (1, 17), (4, 17)])
def test_rows_read_the_fewest_units_whose_weights_reach_p(unit, sliding):
    weights, allowed, rows, first = draw(sliding)
    unread = np.random.default_rng(1).choice([1e-4, 0.01, 0.1, 0.4], (B, K, C))
    config = SelectionConfig(sinks=SINKS, recent=RECENT, unit=unit, allocation="top_p")
    mask, sizes = choose(weights, allowed, rows, unread, config), set()
    for b, k, c in np.ndindex(B, K, C):
        row = weights[b, k, c], rows.own[b, c], rows.start[b, c], first[b, c]
        wanted = [nucleus(*row, unread[b, k, c] + close, unit) for close in (-CLOSE, CLOSE)]
        found = set(np.flatnonzero(mask[b, k, c]))
        assert found in wanted
        sizes.add(len(found))
    assert len(sizes) > 3


def test_p_of_1_reads_everything_and_of_0_what_is_always_read():
    weights, allowed, rows, _ = draw()
    weights[..., 7:12] = 0
    config = SelectionConfig(sinks=SINKS, recent=RECENT, allocation="top_p")
    everything = choose(weights, allowed, rows, np.zeros((B, K, C)), config)
    np.testing.assert_array_equal(everything, np.broadcast_to(allowed, everything.shape))
    assert (choose(weights, allowed, rows, np.full((B, K, C), np.inf), config).sum(-1) == SINKS + RECENT).all()


def test_units_of_one_weight_are_read_together():
    weights, allowed, rows, _ = draw()
    even = np.broadcast_to(allowed / allowed.sum(-1, keepdims=True), weights.shape)
    config = SelectionConfig(sinks=SINKS, recent=RECENT, allocation="top_p")
    found = choose(even, allowed, rows, np.full((B, K, C), 0.5), config)
    np.testing.assert_array_equal(found, np.broadcast_to(allowed, found.shape))


def test_the_budget_is_the_most_that_is_read():
    weights, allowed, rows, _ = draw()
    config = SelectionConfig(sinks=SINKS, recent=RECENT, allocation="top_p")
    unread = np.full((B, K, C), 1e-3)
    whole, found = (choose(weights, allowed, rows, unread, config, most) for most in (S, 9))
    assert (found.sum(-1) == np.minimum(whole.sum(-1), 9)).all() and found.sum() < whole.sum()
