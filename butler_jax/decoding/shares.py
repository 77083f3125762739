"""What a step read, as shares."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.model import BaseConfig, sliding_windows


def shares_read(config: BaseConfig, attended: Int[Array, "L B K"], lengths: Int[Array, " B"]) -> Float[Array, "2 B"]:
    """What each row read: of its tokens in the served layers, and of what dense decoding reads in all layers."""
    attended = attended.astype(jnp.float32)
    own = jnp.ones(lengths.shape, jnp.float32)  # of a base of one layer, which is not served
    if config.served_layers:
        own = jnp.mean(attended[np.asarray(config.served_layers)], axis=(0, 2)) / lengths.astype(jnp.float32)
    windows = jnp.asarray(sliding_windows(config) or (config.context,) * config.layers)
    seen = jnp.sum(jnp.minimum(lengths[None], windows[:, None]), axis=0).astype(jnp.float32)
    return jnp.stack([own, jnp.sum(jnp.mean(attended, axis=2), axis=0) / seen])
