"""Caches of decoding: pytrees of fixed capacity, with the number of tokens each row holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.configs import BaseConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys after rotary, and values, of every layer; a head's rows are contiguous."""

    k: Float[Array, "L B K S D"]
    v: Float[Array, "L B K S D"]

    @property
    def capacity(self) -> int:
        """S, tokens a row has room for."""
        return self.k.shape[3]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreCache:
    """Importance keys of every layer, the cached tokens in the minor dimension; layer 0's are unused."""

    keys: Float[Array, "L B Q R S"]
    trunk: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that decoding carries: caches and the tokens held by each row. scores is None without a predictor."""

    kv: KVCache
    scores: ScoreCache | None
    lengths: Int[Array, " B"]


def empty_kv_cache(config: BaseConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
    """A cache of zeros for `capacity` tokens a row."""
    shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
