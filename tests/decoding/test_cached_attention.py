"""Dense attention of one new token a row over caches of unequal lengths, beside attention in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding import cached_attention
from butler_jax.decoding.cached_attention import attend_cached

KV_HEADS, GROUP, DIM, CAPACITY = 2, 3, 4, 21


def naive(q, new_k, new_v, k, v, cached, window, softcap, sinks):
    """The same in float64, a row and a head at a time, from q [H, D], new_k and new_v [K, D], k and v [K, S, D]."""
    out = np.zeros(q.shape)
    for head in range(len(q)):
        of = head // GROUP
        first = 0 if window is None else max(cached - window + 1, 0)
        keys = np.concatenate([k[of, first:cached], new_k[of : of + 1]])
        values = np.concatenate([v[of, first:cached], new_v[of : of + 1]])
        logits = keys @ q[head] / np.sqrt(DIM)
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[head] - logits.max()))
        out[head] = weights @ values / total
    return out


@pytest.mark.parametrize("block", [4, 8, 64])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 2.0, "sinks": True}], ids=str)
def test_rows_of_unequal_lengths(monkeypatch, block, options):
    """Nothing of a cache counts beyond what its row holds: those keys are huge."""
    monkeypatch.setattr(cached_attention, "BLOCK", block)
    cached = np.asarray([0, 1, 20, 4, 21, 8, 0])
    rng, rows = np.random.default_rng(0), len(cached)
    q, new_k, new_v = (rng.normal(size=(rows, 1, heads, DIM)) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    k, v = rng.normal(size=(2, 2, rows, KV_HEADS, CAPACITY, DIM))
    sinks = rng.normal(size=KV_HEADS * GROUP) if "sinks" in options else None
    window, softcap = options.get("window"), options.get("softcap")
    for row, held in enumerate(cached):
        k[:, row, :, held:], v[:, row, :, held:] = np.finfo(np.float32).max, 0
    q, new_k, new_v, k, v = (a.astype(np.float32) for a in (q, new_k, new_v, k, v))
    attend = jax.jit(partial(attend_cached, softcap=softcap, sliding_window=window))
    found = attend(
        q, new_k, new_v, k, v, 1, jnp.asarray(cached), sink_logits=None if sinks is None else sinks.astype("f")
    )
    of = (a[:, 0].astype(np.float64) for a in (q, new_k, new_v))
    for row, one in enumerate(zip(*of, k[1].astype(np.float64), v[1].astype(np.float64), cached, strict=True)):
        np.testing.assert_allclose(found[row, 0], naive(*one, window, softcap, sinks), atol=2e-6)
