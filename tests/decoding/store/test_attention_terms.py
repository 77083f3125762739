"""Every store attends with the model's soft cap and sinks, to the new token too."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding.newest_tokens import Newest
from butler_jax.decoding.store import EvictingStore, make_store, offload
from butler_jax.model import LayerView
from butler_jax.selection import Chosen
from tests.marked import slow

CACHED, CAP = np.asarray([3, 11]), 0.9
SINKS = jnp.asarray([1.0, -0.5, 0.3, 2.0])


def make_host(k, v):
    return offload(make_store(k, v))


def wanted(q, k, v, sets):
    """One row and head: attention of q [D] over the tokens `sets` of k, v [S, D], with SINKS of the head."""
    out = np.zeros_like(q)
    for b, h in np.ndindex(q.shape[:2]):
        logits = CAP * np.tanh(k[b, h // 2][sets[b][h]] @ q[b, h] * 8**-0.5 / CAP)
        weights = np.exp(logits)
        out[b, h] = weights @ v[b, h // 2][sets[b][h]] / (weights.sum() + np.exp(float(SINKS[h])))
    return out


@pytest.mark.parametrize("apart", [False, slow(True)], ids=["a set a group", "a set a head"])
@pytest.mark.parametrize("make", [make_store, EvictingStore, slow(make_host)])
def test_chosen_tokens_are_attended_under_cap_and_sinks(make, apart):
    if make is make_host and not any(m.kind == "pinned_host" for m in jax.devices()[0].addressable_memories()):
        pytest.skip("no pinned host memory here")
    if apart and make is EvictingStore:
        pytest.skip("policies that evict choose for a group")
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(2, 2, 2, 16, 8)).astype(np.float32) * 2 for _ in "kv")
    q = rng.normal(size=(2, 1, 4, 8)).astype(np.float32) * 2
    new_k, new_v = (rng.normal(size=(2, 1, 2, 8)).astype(np.float32) for _ in "kv")
    view = LayerView(jnp.asarray(1), SimpleNamespace(sinks=SINKS), None, *map(jnp.asarray, (q, new_k, new_k, new_v)))
    view = view._replace(softcap=CAP)
    heads = 4 if apart else 2
    indices = np.stack([np.sort(rng.choice(n, 3, replace=False)) for n in CACHED for _ in range(heads)])
    indices = indices.reshape(2, heads, 3).astype(np.int32)
    if make is EvictingStore:  # what is kept holds the new token
        indices = np.concatenate([indices, np.broadcast_to(CACHED[:, None, None], (2, 2, 1))], axis=-1)
    chosen = Chosen(jnp.asarray(indices), jnp.ones(indices.shape, bool))
    how = dict(unit=1, rows=None, implementation=None)
    found, _ = make(jnp.asarray(k), jnp.asarray(v)).attend(view, chosen, Newest(jnp.asarray(CACHED), None), **how)
    rows = np.arange(2)
    all_k, all_v = (a[1].copy() for a in (k, v))
    all_k[rows, :, CACHED], all_v[rows, :, CACHED] = new_k[:, 0], new_v[:, 0]
    sets = [[[*indices[b, h if apart else h // 2][:3], CACHED[b]] for h in range(4)] for b in range(2)]
    np.testing.assert_allclose(found[:, 0], wanted(q[:, 0], all_k, all_v, sets), atol=1e-5)
