"""Caches of decoding: pytrees of fixed capacity, with the number of tokens each row holds.

A pass over the layers only reads them; the tokens it made are written afterwards, all layers at once, so that donated
caches are updated in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.decoding.parts import write_parts
from butler_jax.model import BaseConfig
from butler_jax.parallel import current_mesh, partition
from butler_jax.selection import Chosen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys after rotary, and values, of every layer; a head's rows are contiguous.

    near: layer 0 on the device, where k and v are in host memory (offload.py); None where they are on the device.
    """

    k: Float[Array, "L B K S D"]
    v: Float[Array, "L B K S D"]
    near: KVCache | None = None

    @property
    def capacity(self) -> int:
        """S, tokens a row has room for."""
        return self.k.shape[3]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreCache:
    """Importance keys of every layer, the cached tokens in the minor dimension; layer 0's are unused.

    trunk: cache of a predictor's own attention, stacked over producers; None where it has none. scales: what a step of
    int8 keys is worth (score_cache.py); None where keys are floats.
    """

    k_imp: Float[Array, "L B Q R S"]
    trunk: Any = None
    scales: Float[Array, "L B Q"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that decoding carries from step to step; donate it.

    lengths: tokens each row holds. scores: None without a predictor. steps: decode steps so far. chosen: the units of
    every layer [L, B, K, N] that the last choice keeps for the steps until the next one, None where every step
    chooses. evicted: what every layer has kept under a policy that evicts (eviction.py), None under others.
    """

    kv: KVCache
    scores: ScoreCache | None
    lengths: Int[Array, " B"]
    steps: Int[Array, ""]
    chosen: Chosen | None = None
    evicted: Any = None


def state_partition(state: DecodeState, mesh: Any) -> DecodeState:
    """The PartitionSpec of every array of a state: rows, KV heads and tokens are split where the mesh divides them."""

    def spec(path, array):
        fields = {getattr(part, "name", None) for part in path}
        names = ["batch"] if array.ndim < 2 else ["layers", "batch", "whole" if "trunk" in fields else "cached_heads"]
        names = [*names, *["whole"] * array.ndim][: array.ndim]
        if "kv" in fields:
            names[3] = "tokens"
        elif "k_imp" in fields:
            names[4] = "tokens"
        return partition(tuple(names), array.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, state)


def split_state(state: DecodeState) -> DecodeState:
    """The state split over the devices of the current mesh, under jit; outside of a mesh the state itself."""
    mesh = current_mesh()
    return state if mesh is None else jax.lax.with_sharding_constraint(state, state_partition(state, mesh))


def empty_kv_cache(config: BaseConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
    """A cache of zeros for `capacity` tokens a row."""
    shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_token(
    cache: Float[Array, "L B K S D"], new: Float[Array, "L B K D"], lengths: Int[Array, " B"], letters: str = "-bhs-"
) -> Float[Array, "L B K S D"]:
    """The cache with one more token a row, at its length; a full row stays as it is.

    letters: of the cache, as in sharding.by_rows_and_heads. Row after row, so that each write is a slice: for a scatter
    over rows the TPU's compiler changes the layout of the whole cache and back.
    """
    axis = letters.index("s")

    def put(cache, new, places):
        new = jnp.expand_dims(new, axis).astype(cache.dtype)

        def one(row, cache):
            at = [0] * cache.ndim
            at[letters.index("b")], at[axis] = row, places[row]
            token = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=letters.index("b"))
            old = jax.lax.dynamic_slice(cache, at, token.shape)
            return jax.lax.dynamic_update_slice(cache, jnp.where(places[row] < cache.shape[axis], token, old), at)

        return jax.lax.fori_loop(0, places.shape[0], one, cache)

    return write_parts(put, cache, new, lengths, (letters, "-bh-", "b"))


def empty_chosen(config: BaseConfig, batch: int, heads: int, room: int) -> Chosen:
    """Room for the units that every layer keeps over several steps."""
    shape = (config.layers, batch, heads, room)
    return Chosen(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
