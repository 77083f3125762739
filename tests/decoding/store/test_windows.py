"""A layer that slides reads the window of each row and nothing else of the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding.newest_tokens import Newest
from butler_jax.decoding.store import EvictingStore, make_store, offload
from butler_jax.model import LayerView
from tests.marked import slow

WINDOW, LENGTHS = 21, np.asarray([0, 5, 20, 21, 58, 95])


def make_host(k, v):
    return offload(make_store(k, v))


@pytest.mark.parametrize(
    ("make", "capacity"),  # pages of 16 tokens, and of one
    [
        slow(make_store, 96),
        slow(make_store, 99),
        slow(EvictingStore, 99),
        slow(make_host, 96),
    ],
)
def test_a_window_is_read_alone(make, capacity):
    if make is make_host and not any(m.kind == "pinned_host" for m in jax.devices()[0].addressable_memories()):
        pytest.skip("no pinned host memory here")
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (2, len(LENGTHS), 2, capacity, 8)
    k, v = (jax.random.normal(key, shape) for key in keys[:2])
    q, new_k, new_v = (
        jax.random.normal(key, (len(LENGTHS), 1, heads, 8)) for key, heads in zip(keys[2:], (4, 2, 2), strict=True)
    )
    columns = np.arange(capacity)[None]
    seen = (columns > LENGTHS[:, None] - WINDOW) & (columns < LENGTHS[:, None])
    k, v = (jnp.where(seen[None, :, None, :, None], a, jnp.nan) for a in (k, v))
    view = LayerView(jnp.asarray(1), None, None, q, new_k, new_k, new_v)
    newest = Newest(jnp.asarray(LENGTHS), np.asarray([2**30, WINDOW]))
    found = make(k, v).attend_seen(view, newest, WINDOW, implementation=None)
    for b, held in enumerate(LENGTHS):
        own_k, own_v = (
            np.concatenate([np.asarray(a)[1, b][:, seen[b]], np.asarray(new[b]).swapaxes(0, 1)], axis=1)
            for a, new in ((k, new_k), (v, new_v))
        )
        assert own_k.shape[1] == min(held + 1, WINDOW)
        logits = np.einsum("kgd,knd->kgn", np.asarray(q[b, 0]).reshape(2, 2, 8), own_k) * 8**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = np.einsum("kgn,knd->kgd", weights / weights.sum(-1, keepdims=True), own_v)
        np.testing.assert_allclose(found[b, 0], out.reshape(4, 8), atol=1e-5)  # float32 sums in another order
