"""Policies that evict, against a form that keeps a list of tokens per head, row by row in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.decoder import LayerView
from butler_jax.policies import evict, make_policy
from butler_jax.selection.budget import Limits, budget_table
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation.eviction import evicted_sums, evicting_attention

B, T, K, G, D = 2, 60, 2, 3, 8
SINKS, WINDOW = 2, 3


def inputs(seed=0):
    random = np.random.default_rng(seed)
    q, k = 2 * random.normal(size=(B, T, K * G, D)), random.normal(size=(B, T, K, D))
    v = random.normal(size=(B, T, K, D))
    segments = np.ones((B, T), np.int32)
    segments[1, 25:] = 2  # a second document, and padding
    segments[1, 55:] = 0
    return q, k, v, segments


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def h2o_worth(rows, token):
    return sum(seen.get(token, 0.0) for _, _, seen in rows)


def snapkv_worth(rows, token, observed=6, pool=3):
    near = range(token - pool // 2, token + pool // 2 + 1)
    return max(sum(seen.get(t, 0.0) for _, _, seen in rows[-observed:]) for t in near)


def citrus_worth(rows, token, chunk=4, observed=2):
    """By the last chunk that ended; its own tokens and later ones are above all."""
    at, worth = 0, np.inf
    while at < len(rows):
        size = max(1, min(chunk, rows[max(at - 1, 0)][1] // 5))
        part = rows[at : at + size]
        if len(part) == size:
            worth = sum(seen.get(token, 0.0) for _, _, seen in part[-observed:]) if token < part[0][0] else np.inf
        at += size
    return worth


CASES = {
    "h2o": ({}, h2o_worth, lambda budget: budget // 2),
    "snapkv": ({"observed": 6, "pool": 3}, snapkv_worth, lambda budget: min(6, budget // 2)),
    "citrus": ({"chunk": 4, "observed": 2}, citrus_worth, lambda budget: 1),
}


def naive(q, k, v, segments, budget, worth, recent, sliding_window):
    """Output [B, T, K*G, D], tokens read [B, T, K], recalled mass [B, T, K*G], and the last row's set [B, K, T]."""
    output, read, mass = np.zeros((B, T, K * G, D)), np.zeros((B, T, K)), np.zeros((B, T, K * G))
    last = np.zeros((B, K, T), bool)
    for b, h in np.ndindex(B, K):
        kept, rows, start = [], [], 0
        for t in range(T):
            if t and segments[b, t] != segments[b, t - 1]:
                kept, rows, start = [], [], t
            low = start if sliding_window is None else max(start, t - sliding_window + 1)
            n = int(budget[t - low + 1])
            kept = [j for j in kept if j >= low] + [t]
            forced = set(range(start, start + SINKS)) | set(range(t - max(WINDOW, recent(n)) + 1, t + 1))
            while len(kept) > n:  # once, but where min_context ends
                free = [j for j in kept if j not in forced]
                kept.remove(min(free, key=lambda j: (worth(rows, j), j)))
            seen = {}
            for g in range(G):
                logits = k[b, :, h] @ q[b, t, h * G + g] / np.sqrt(D)
                weights = softmax(logits[kept])
                output[b, t, h * G + g] = weights @ v[b, kept, h]
                true = dict(zip(range(low, t + 1), softmax(logits[low : t + 1]), strict=True))
                mass[b, t, h * G + g] = sum(true[j] for j in kept)
                for j, weight in zip(kept, weights, strict=True):
                    seen[j] = seen.get(j, 0.0) + weight
            rows.append((t, n, seen))
            read[b, t, h] = len(kept) / (t - low + 1)
        last[b, h, kept] = True
    return output, read, mass, last


def compare(name, sliding_window, selection):
    q, k, v, segments = inputs()
    fields, worth, recent = CASES[name]
    table, policy = budget_table(selection, T), make_policy(name, **fields)
    view = LayerView(jnp.asarray(1), None, None, *(jnp.asarray(a, jnp.float32) for a in (q, k, k, v)))
    limits = Limits(jnp.asarray(table), None, selection.min_context)
    found = evicting_attention(view, jnp.asarray(segments), sliding_window, policy, limits, selection, mass=True)
    wanted = naive(q, k, v, segments, table, worth, recent, sliding_window)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(found.output)[real], wanted[0][real], atol=1e-5)  # float32 sums
    np.testing.assert_allclose(np.asarray(found.fraction)[real], wanted[1].mean(-1)[real], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found.mass)[real], wanted[2].mean(-1)[real], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.kept), wanted[3])
    assert (wanted[1][real] < 1).any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sliding_window", [None, 20])
def test_rows_attend_what_earlier_rows_kept(name, sliding_window):
    compare(name, sliding_window, SelectionConfig(budget=0.4, sinks=SINKS, recent=WINDOW))


@pytest.mark.parametrize("name", CASES)
def test_where_min_context_ends_a_row_drops_as_many_as_it_must(name):
    compare(name, None, SelectionConfig(budget=8, sinks=SINKS, recent=WINDOW, min_context=20))


def test_budgets_together_are_each_budget_alone():
    q, k, v, segments = inputs()
    view = LayerView(jnp.asarray(1), None, None, *(jnp.asarray(a, jnp.float32) for a in (q, k, k, v)))
    rules = [SelectionConfig(budget=b, sinks=SINKS, recent=WINDOW) for b in (0.2, 0.5, 9)]
    tables = np.stack([budget_table(r, T) for r in rules])
    policy = make_policy("snapkv", observed=6, pool=3)
    counted = (segments > 0) & (np.arange(T) % 3 == 1)
    together = evicted_sums(
        view, jnp.asarray(segments), None, policy, jnp.asarray(tables), rules[0], jnp.asarray(counted)
    )
    for n, table in enumerate(tables):
        wanted = naive(q, k, v, segments, table, *CASES["snapkv"][1:], None)
        for found, values in zip(together, (wanted[2], wanted[1]), strict=True):
            wanted_sums = np.where(counted, values.mean(-1), 0).sum(axis=1)
            np.testing.assert_allclose(found[n], wanted_sums, rtol=1e-5)  # sums of 20 rows


@pytest.mark.parametrize("worth", [np.nan, np.inf, -np.inf])
def test_a_worth_that_is_not_finite_exceeds_no_budget(worth):
    protected = np.zeros((1, 10), bool)
    protected[0, :2] = True
    kept = evict(jnp.ones((1, 2, 10), bool), jnp.full((1, 2, 10), worth), protected, jnp.asarray([9]))
    assert np.asarray(kept).tolist() == [[[True, True, False, *[True] * 7]] * 2]


def test_layer_0_keeps_everything_and_settings_that_mean_nothing_are_refused():
    q, k, v, segments = inputs()
    view = LayerView(jnp.asarray(0), None, None, *(jnp.asarray(a, jnp.float32) for a in (q, k, k, v)))
    selection = SelectionConfig(budget=0.3, sinks=SINKS, recent=WINDOW)
    limits = Limits(jnp.asarray(budget_table(selection, T)), None, 0)
    found = evicting_attention(view, jnp.asarray(segments), None, make_policy("h2o"), limits, selection)
    assert (np.asarray(found.fraction) == 1).all()
    for fields in (dict(unit=4), dict(neighbours=True)):
        with pytest.raises(ValueError, match="h2o evicts token by token: leave out unit, threshold and neighbours"):
            make_policy("h2o").selection(SelectionConfig(**fields))
    with pytest.raises(ValueError, match="h2o evicts at every row: leave out the interval"):
        make_policy("h2o").selection(SelectionConfig(interval=4))
    with pytest.raises(ValueError, match="a chunk of citrus must have at least 1 token, got 0"):
        make_policy("citrus", chunk=0)
    with pytest.raises(ValueError, match="snapkv pools an odd number of tokens, got 4"):
        make_policy("snapkv", pool=4)
