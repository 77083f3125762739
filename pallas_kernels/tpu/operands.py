"""Operands of the TPU kernels. Batch and KV heads become one axis of rows; in caches, layers join it too."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.operands import layer_indices


def bounds(lengths, first):
    """The first token that each row sees and the end of its tokens, int32 [B, 2]."""
    start = jnp.zeros(lengths.shape, jnp.int32) if first is None else jnp.maximum(first.astype(jnp.int32), 0)
    return jnp.stack([start, lengths.astype(jnp.int32)], axis=1)


def score_operands(q_imp, k_imp, lengths, *, scales, scale, first, layer):
    """(layers, bounds, q_imp [rows, G, R], factor [rows] of the products, k_imp [L*B*Q, R, S])."""
    batch, key_heads = q_imp.shape[0], k_imp.shape[-3]
    q_imp = q_imp.reshape(batch * key_heads, -1, q_imp.shape[-1])
    k_imp = k_imp.reshape(-1, *k_imp.shape[-2:])
    factor = score_factor(batch, key_heads, scales, scale)
    return layer_indices(layer), bounds(lengths, first), q_imp, factor, k_imp


def score_factor(batch, key_heads, scales, scale):
    """What each row's products of q_imp and k_imp are multiplied by, float32 [rows]."""
    if scales is None:
        return np.full(batch * key_heads, scale, np.float32)
    return (jnp.broadcast_to(scales, (batch, key_heads)).astype(jnp.float32) * np.float32(scale)).reshape(-1)


def attention_operands(q, k, v, indices, valid, *, lengths, first, layer):
    """(first row, units [rows, N], bounds, queries [rows, G, D], keys and values [L*rows, S, D]); -1 is no unit."""
    batch, heads, n = indices.shape
    size, dim = k.shape[-2:]
    rows = batch * heads
    lengths = jnp.full((batch,), size, jnp.int32) if lengths is None else jnp.minimum(lengths, size)
    units = (indices if valid is None else jnp.where(valid, indices, -1)).reshape(rows, n)
    queries = q.reshape(rows, -1, dim)
    caches = (a.reshape(-1, size, dim) for a in (k, v))
    return layer_indices(layer) * rows, units, bounds(lengths, first), queries, *caches
