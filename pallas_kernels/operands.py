"""Where a row of queries lies in a cache. Batch and KV heads become one axis of rows; in caches, layers join it too."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def layer_indices(layer):
    """The layers that are read of a stacked cache, int32 [P]; a cache that is not stacked is one."""
    return jnp.zeros((1,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(-1)


def cache_row(layers, row, rows, heads):
    """The row of a cache that one of `rows` rows reads; the rows of the P layers alternate, `heads` at a time."""
    count = layers.shape[0]
    if count == 1:
        return layers[0] * np.int32(rows) + row
    sequence = row // heads
    return layers[sequence % count] * np.int32(rows // count) + sequence // count * heads + row % heads
