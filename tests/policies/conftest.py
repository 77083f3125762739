"""A chunk of random rows, keys and scores."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.policies import Chunk
from butler_jax.selection.masks import Rows
from tests.policies.chunks import B, C, D, G, K, S


@pytest.fixture(scope="session")
def chunk():
    random = np.random.default_rng(0)
    q, k = random.normal(size=(B, K, G, C, D)), random.normal(size=(B, K, S, D))
    own = np.broadcast_to(np.arange(S - C, S), (B, C)).astype(np.int32)
    start = np.array([[0] * C, [5] * C], np.int32)
    columns = np.arange(S)
    allowed = (columns <= own[..., None]) & (columns >= start[..., None])
    arrays = dict(
        layer=np.int32(3),
        weights=SimpleNamespace(o=np.float32(random.normal(size=(K * G, D, 16)))),
        x=np.float32(random.normal(size=(B, C, 16))),
        q=np.float32(q),
        k=np.float32(k),
        v=np.float32(random.normal(size=(B, K, S, D))),
        logits=np.float32(np.einsum("bkgcd,bksd->bkgcs", q, k)),
        predicted=np.float32(random.normal(size=(B, K, G, C, S)) * 3),
        rows=Rows(own, start),
        columns=columns,
        allowed=allowed,
        starts=np.array([[0] * S, [0] * 5 + [5] * (S - 5)], np.int32),
        sinks=2,
        recent=3,
    )
    return Chunk(**{name: a if name == "weights" else jax.tree.map(jnp.asarray, a) for name, a in arrays.items()})
