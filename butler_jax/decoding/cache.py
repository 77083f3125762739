"""What decoding carries from step to step: pytrees of fixed capacity, with the number of tokens each row holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from butler_jax.decoding.eviction import Eviction
from butler_jax.decoding.score_cache import ScoreCache
from butler_jax.decoding.span_means import SpanMeans
from butler_jax.decoding.store import HostStore, KVStore, make_store, zeros_on_host
from butler_jax.model import BaseConfig
from butler_jax.parallel import current_mesh, partition
from butler_jax.selection import Chosen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that decoding carries from step to step; donate it.

    Attributes:
        kv: Keys and values of the cached tokens.
        scores: What the predictor keeps of them; None without a predictor.
        lengths: Tokens that each row holds.
        steps: Decode steps so far.
        memory: What a choice remembers for the next steps: under an interval the `Chosen` units of every layer, under a
            policy that evicts the `Eviction` of every layer, else None.
        spans: Means of spans, under a selection with a tail; else None.
    """

    kv: KVStore
    scores: ScoreCache | None
    lengths: Int[Array, " B"]
    steps: Int[Array, ""]
    memory: Chosen | Eviction | None = None
    spans: SpanMeans | None = None


def state_partition(state: DecodeState, mesh: Any) -> DecodeState:
    """The PartitionSpec of every array of a state: the mesh splits rows, KV heads and tokens it divides."""

    def spec(path, array):
        fields = {getattr(part, "name", None) for part in path}
        names = ["batch"] if array.ndim < 2 else ["layers", "batch", "whole" if "trunk" in fields else "cached_heads"]
        names = [*names, *["whole"] * array.ndim][: array.ndim]
        if "kv" in fields or ("spans" in fields and array.ndim == 5):
            names[3] = "tokens"
        elif "k_imp" in fields:
            names[4] = "tokens"
        return partition(tuple(names), array.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, state)


def constrain_state(state: DecodeState) -> DecodeState:
    """The state split over the devices of the current mesh, under jit; a state in host memory stays whole."""
    mesh = current_mesh()
    if mesh is None or state.kv.on_host:
        return state
    return jax.lax.with_sharding_constraint(state, state_partition(state, mesh))


def empty_store(config: BaseConfig, batch: int, capacity: int, dtype: Any) -> KVStore:
    """A store of zeros for `capacity` tokens a row."""
    shape = _shape(config, batch, capacity)
    return make_store(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def empty_host_store(config: BaseConfig, batch: int, capacity: int, dtype: Any, sharding: Any) -> HostStore:
    """The same in host memory, outside of jit. On the device, where `sharding` says, there is layer 0 alone."""
    return zeros_on_host(_shape(config, batch, capacity), dtype, sharding)


def _shape(config: BaseConfig, batch: int, capacity: int) -> tuple[int, ...]:
    return config.layers, batch, config.kv_heads, capacity, config.head_dim
