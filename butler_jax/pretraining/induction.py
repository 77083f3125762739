"""An induction circuit written into a fresh model, which then only has to be tuned."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from butler_jax.model import BaseModel, rope_frequencies


def wire_induction(model: BaseModel) -> BaseModel:
    """A fresh model whose first two layers hold an induction circuit: what followed this token last time?

    Head 0 of layer 0 attends to the previous token: its query is a constant coordinate of the embeddings, turned by one
    step of the fast rotary pairs. It copies the identity of that token to a subspace. Head 0 of layer 1 looks for the
    current token in this subspace, by the slow pairs, and raises the logit of the token that it finds there.

    Models of this size form the circuit late, after far more text than this recipe reads (Olsson et al. 2022,
    "In-context learning and induction heads"). The strengths are those with the best accuracy on repeated random tokens
    at step 0.
    """
    config = model.config
    width, dim, half = config.width, config.head_dim, config.head_dim // 2
    frequencies, _ = rope_frequencies(config.rope, dim, context=config.context, length=0)
    fast = np.flatnonzero(frequencies > 0.1)
    slow = np.flatnonzero(frequencies < 0.008)
    random = np.random.default_rng(0)
    embedding, q, k, v, o = (
        np.array(p[...], np.float32)
        for p in (model.embedding, model.layers.q, model.layers.k, model.layers.v, model.layers.o)
    )
    unit = width**-0.5
    embedding[:, 0] = 4 * unit
    constant = 4 / np.sqrt(1 + 15 / width)  # coordinate 0 after the norm

    def subspace(columns: int) -> np.ndarray:
        basis = random.normal(size=(width, columns))
        basis[0] = 0
        return np.linalg.qr(basis)[0].astype(np.float32)

    both = subspace(2 * dim)
    identity, previous, copied = both[:, :dim], both[:, dim:], subspace(dim)
    q[:2, :, 0], k[:2, :, 0] = 0, 0
    k[0, 0, 0, fast] = q[0, 0, 0, fast] = np.sqrt(60) / constant
    q[0, 0, 0, half + fast] = -q[0, 0, 0, fast] * np.sin(frequencies[fast])
    q[0, 0, 0, fast] *= np.cos(frequencies[fast])
    v[0, :, 0], o[0, 0] = identity, 3 * unit * previous.T
    dims = np.concatenate([slow, half + slow])
    q[1][:, 0, dims], k[1][:, 0, dims] = 2 * identity[:, : len(dims)], 2 * previous[:, : len(dims)]
    v[1, :, 0], o[1, 0] = copied, 12 * unit * copied.T
    model.embedding = nnx.Param(jnp.asarray(embedding))
    for name, value in (("q", q), ("k", k), ("v", v), ("o", o)):
        setattr(model.layers, name, nnx.Param(jnp.asarray(value)))
    return model
