"""Keys and values in host memory: only the rows that a step reads go to the device.

Layer 0, which is always dense, stays on the device. Gathers and writes run on the host, where the caches lie
(`jax.experimental.compute_on`); on a platform whose only memory is the host's the same code runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding.cache import KVCache, write_token
from butler_jax.selection import Chosen

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` run on the host, with operands and results in its memory."""
    decorate = getattr(compute_on, "compute_on2", compute_on.compute_on)  # its name before jax 0.11
    return decorate(function, compute_type="device_host", out_memory_spaces=HOST)


def can_offload() -> bool:
    """Whether the default device can address pinned host memory."""
    return any(memory.kind == KIND for memory in jax.devices()[0].addressable_memories())


def to_host(kv: KVCache) -> KVCache:
    """The caches in host memory, a copy of layer 0 on the device; for concrete arrays, outside of jit.

    Donates nothing: drop the argument to free the device. Raises ValueError where the platform has no such memory.
    """
    if not can_offload():
        kinds = ", ".join(memory.kind for memory in jax.devices()[0].addressable_memories())
        raise ValueError(f"offload needs {KIND} memory, and {jax.devices()[0].platform} has only {kinds}")
    near = KVCache(kv.k[:1], kv.v[:1])
    host = kv.k.sharding.with_memory_kind(KIND)
    return KVCache(*(jax.device_put(a, host) for a in (kv.k, kv.v)), near)


class Fetched(NamedTuple):
    """Rows of chosen units on the device, and which of them a row attends."""

    k: Float[Array, "B K M D"]
    v: Float[Array, "B K M D"]
    held: Bool[Array, "B K M"]


def fetch_units(
    kv: KVCache,
    layer: Int[Array, ""],
    chosen: Chosen,
    unit: int,
    cached: Int[Array, " B"],
    first: Int[Array, " B"] | None,
) -> Fetched:
    """The rows of some units of a layer; tokens beyond `cached` or before `first`, and invalid units, are not held."""
    layers, batch, heads, size, dim = kv.k.shape
    tokens = chosen.indices[..., None] * unit + jnp.arange(unit, dtype=jnp.int32)[None, None, None]
    held = chosen.valid[..., None] & (tokens < cached[:, None, None, None])
    if first is not None:
        held &= tokens >= first[:, None, None, None]
    tokens, held = (a.reshape(batch, heads, -1) for a in (jnp.where(held, tokens, 0), held))
    row = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1)
    place = (layer * (batch * heads) + row) * size + tokens

    @on_host
    def gather(k, v, place):
        k, v = (a.reshape(layers * batch * heads * size, dim) for a in (k, v))
        return tuple(a.at[place].get(mode="promise_in_bounds") for a in (k, v))

    return Fetched(*jax.device_put(gather(kv.k, kv.v, jax.device_put(place, HOST)), DEVICE), held)


def fetch_layer(kv: KVCache, layer: Int[Array, ""]) -> KVCache:
    """One whole layer on the device, [1, B, K, S, D]."""

    @on_host
    def take(k, v, layer):
        return tuple(jax.lax.dynamic_slice_in_dim(a, layer, 1) for a in (k, v))

    return KVCache(*jax.device_put(take(kv.k, kv.v, jax.device_put(layer, HOST)), DEVICE))


def write_token_on_host(
    kv: KVCache, k: Float[Array, "L B K D"], v: Float[Array, "L B K D"], lengths: Int[Array, " B"]
) -> KVCache:
    """The caches with one more token a row."""
    near = KVCache(*(write_token(a, b[:1], lengths) for a, b in ((kv.near.k, k), (kv.near.v, v))))
    *rows, size, dim = kv.k.shape
    count = math.prod(rows)
    place = jnp.arange(count, dtype=jnp.int32).reshape(rows) * size + lengths[None, :, None]
    place = jnp.where((lengths < size)[None, :, None], place, count * size)  # a full row takes nothing more

    @on_host
    def write(cache, new, place):
        return cache.reshape(count * size, dim).at[place].set(new, mode="drop").reshape(cache.shape)

    new_k, new_v, place = jax.device_put((k.astype(kv.k.dtype), v.astype(kv.v.dtype), place), HOST)
    return KVCache(write(kv.k, new_k, place), write(kv.v, new_v, place), near)
