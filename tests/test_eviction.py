"""Policies that evict, against a form that keeps a Python list of tokens a head and goes row by row in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.base_model import LayerView
from butler_jax.configs import SelectionConfig
from butler_jax.evaluation.eviction import evicting_attention
from butler_jax.policies import make_policy
from butler_jax.selection import Limits, budget_table

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


def h2o_worth(rows, token, n):
    return sum(row.get(token, 0.0) for row in rows)


def snapkv_worth(rows, token, n, observed=6, pool=3):
    near = range(token - pool // 2, token + pool // 2 + 1)
    return max(sum(row.get(t, 0.0) for row in rows[-observed:]) for t in near)


CASES = {
    "h2o": ({}, h2o_worth, lambda budget: budget // 2),
    "snapkv": ({"observed": 6, "pool": 3}, snapkv_worth, lambda budget: min(6, budget // 2)),
}


def naive(q, k, v, segments, budget, worth, recent, window):
    """Output [B, T, K*G, D], tokens read [B, T, K] and recalled mass [B, T, K*G]."""
    output, read, mass = np.zeros((B, T, K * G, D)), np.zeros((B, T, K)), np.zeros((B, T, K * G))
    for b, h in np.ndindex(B, K):
        kept, rows, start = [], [], 0
        for t in range(T):
            if t and segments[b, t] != segments[b, t - 1]:
                kept, rows, start = [], [], t
            low = start if window is None else max(start, t - window + 1)
            n = int(budget[t - low + 1])
            kept = [j for j in kept if j >= low] + [t]
            forced = set(range(start, start + SINKS)) | set(range(t - max(WINDOW, recent(n)) + 1, t + 1))
            if len(kept) > n:
                free = [j for j in kept if j not in forced]
                kept.remove(min(free, key=lambda j: (worth(rows, j, n), j)))
            seen = {}
            for g in range(G):
                logits = k[b, :, h] @ q[b, t, h * G + g] / np.sqrt(D)
                weights = softmax(logits[kept])
                output[b, t, h * G + g] = weights @ v[b, kept, h]
                true = dict(zip(range(low, t + 1), softmax(logits[low : t + 1]), strict=True))
                mass[b, t, h * G + g] = sum(true[j] for j in kept)
                for j, weight in zip(kept, weights, strict=True):
                    seen[j] = seen.get(j, 0.0) + weight
            rows.append(seen)
            read[b, t, h] = len(kept) / (t - low + 1)
    return output, read, mass


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 20])
def test_rows_attend_what_earlier_rows_kept(name, window):
    q, k, v, segments = inputs()
    fields, worth, recent = CASES[name]
    selection = SelectionConfig(budget=0.4, sinks=SINKS, window=WINDOW)
    table = budget_table(selection, T)
    view = LayerView(jnp.asarray(1), None, None, *(jnp.asarray(a, jnp.float32) for a in (q, k, k, v)))
    found = evicting_attention(
        view, jnp.asarray(segments), window, make_policy(name, **fields), Limits(jnp.asarray(table), None, 0), selection,
        mass=True,
    )  # fmt: skip
    wanted = naive(q, k, v, segments, table, worth, recent, window)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(found.output)[real], wanted[0][real], atol=1e-5)  # float32 sums
    np.testing.assert_allclose(np.asarray(found.fraction)[real], wanted[1].mean(-1)[real], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found.mass)[real], wanted[2].mean(-1)[real], atol=1e-5)
    assert (wanted[1][real] < 1).any()


def test_layer_0_keeps_everything_and_settings_that_mean_nothing_are_refused():
    q, k, v, segments = inputs()
    view = LayerView(jnp.asarray(0), None, None, *(jnp.asarray(a, jnp.float32) for a in (q, k, k, v)))
    selection = SelectionConfig(budget=0.3, sinks=SINKS, window=WINDOW)
    limits = Limits(jnp.asarray(budget_table(selection, T)), None, 0)
    found = evicting_attention(view, jnp.asarray(segments), None, make_policy("h2o"), limits, selection)
    assert (np.asarray(found.fraction) == 1).all()
    for fields in (dict(unit=4), dict(neighbours=True)):
        with pytest.raises(ValueError, match="h2o evicts token by token: leave out unit, threshold and neighbours"):
            make_policy("h2o").selection(SelectionConfig(**fields))
    with pytest.raises(ValueError, match="snapkv pools an odd number of tokens, got 4"):
        make_policy("snapkv", pool=4)
