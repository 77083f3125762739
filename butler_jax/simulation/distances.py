"""How far back attention weight lies, and how far back keys are read.

Distances are in tokens, and a query's own token is at distance 1. Bin b has the distances from 2^b up to 2^(b+1), which
is left out.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped


def count_bins(tokens: int) -> int:
    """How many bins a sequence of so many tokens has."""
    return tokens.bit_length()


def sum_by_distance(
    values: Shaped[Array, "*B C S"], own: Int[Array, "*#B C"], columns: Int[Array, " S"], bins: int
) -> Float[Array, "*B C bins"]:
    """The sums of each row's values by distance.

    Args:
        values: Of every key; 0 of those that a row may not see.
        own: The columns of the query rows.
        columns: Of the keys, in order and without gaps.
    """
    upto = jnp.cumsum(values.astype(jnp.float32), axis=-1)
    upto = jnp.concatenate([jnp.zeros_like(upto[..., :1]), upto], axis=-1)
    last = [own + 1 - 2**b for b in range(bins + 1)]  # the last column of each bin
    keys = jnp.clip(jnp.stack(last, axis=-1) - columns[0] + 1, 0, columns.shape[0])
    found = jnp.take_along_axis(upto, jnp.broadcast_to(keys, (*upto.shape[:-1], bins + 1)), axis=-1)
    return found[..., :-1] - found[..., 1:]


def mean_distances(
    weights: Float[np.ndarray, " bins"], found: Float[np.ndarray, "2 bins"], rows: float
) -> dict[str, list[float]]:
    """The means of sums over so many rows, JSON-ready.

    Returns:
        By bin of distances: true, the attention weight of all keys; recalled, that of the keys read; and read, the
        share of the keys read that lies there.
    """
    recalled, read = found
    shares = {"true": weights / rows, "recalled": recalled / rows, "read": read / max(read.sum(), 1e-30)}
    return {name: (np.round(values, 6) + 0.0).tolist() for name, values in shares.items()}  # no -0.0
