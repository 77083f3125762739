"""The second stage of training: the cross entropy among the keys alone that the predictor's own scores choose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.selection import Rows, SelectionConfig, budget_table, select_mask
from butler_jax.training.losses.contested_keys import KeyRange


def chosen_keys(
    log_weights: Float[Array, "B K G C S"],
    seen: Bool[Array, "_ C S"],
    index: Int[Array, ""],
    first: Int[Array, ""] | int,
    starts: Int[Array, "_ T"],
    keys: KeyRange,
) -> Bool[Array, "B K C S"]:
    """The keys that the rows of a chunk would read in decoding, per head, under the budget of `keys`.

    Args:
        log_weights: Logarithms of predicted weights or errors, -inf where a key is not contested. A group counts by its
            largest, as in the policy `tokenbutler`.
        seen: The keys that each row attends to.
        index: Of the chunk. first: position of the first key. starts: where the document of each token begins.
    """
    batch, _, _, chunk, size = log_weights.shape
    own = jnp.broadcast_to((index * chunk + jnp.arange(chunk, dtype=jnp.int32))[None], (batch, chunk))
    start = jax.lax.dynamic_slice_in_dim(starts, index * chunk, chunk, axis=1)
    rows = Rows(own, jnp.broadcast_to(start, own.shape))
    config = SelectionConfig(budget=keys.chosen, sinks=keys.sinks, recent=max(keys.recent, 1))
    seen = jnp.broadcast_to(seen, (batch, chunk, size))
    tokens = jnp.asarray(budget_table(config, size))[jnp.sum(seen, axis=-1, dtype=jnp.int32)]
    columns = first + jnp.arange(size, dtype=jnp.int32)
    return select_mask(jnp.max(log_weights, axis=2), seen[:, None], rows, tokens, config, columns=columns)
