"""Keys and values in host memory: only the rows that a step reads travel to the device.

Layer 0, which is always dense, stays on the device. Gathers and writes run on the host, where the arrays lie
(`jax.experimental.compute_on`). On a platform whose only memory is the host's, the same code runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import compute_on
from jaxtyping import Array, Bool, Float

from butler_jax.decoding.cached_attention import attend_cached
from butler_jax.decoding.store.base import KVStore, attend_chosen, held_tokens, sum_spans
from butler_jax.decoding.store.resident import ResidentStore
from butler_jax.parallel import by_rows_and_heads
from butler_jax.selection import Chosen
from pallas_kernels import Spans

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"


class Fetched(NamedTuple):
    """Rows of chosen units on the device, and which of them a row attends."""

    k: Float[Array, "B K tokens D"]
    v: Float[Array, "B K tokens D"]
    held: Bool[Array, "B K tokens"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HostStore(KVStore):
    """Keys and values of all layers in host memory.

    Attributes:
        near: Layer 0 on the device.
    """

    on_host = True
    near: ResidentStore

    def layer(self, index):
        """One layer, fetched."""
        k, v = self._fetch_layer(index)
        return k[0], v[0]

    def attend_all(self, view, newest):
        """Return dense attention; the whole layer travels."""
        k, v = self._fetch_layer(view.index)
        sliding_window = newest.sliding_window(view.index)
        where = (k, v, 0, newest.cached, sliding_window)
        return attend_cached(view.q, view.k, view.v, *where, **view.attention_terms)

    def attend_first(self, view, newest, sliding_window, *, implementation):
        """Return dense attention of layer 0, which is near."""
        return self.near.attend_first(view, newest, sliding_window, implementation=implementation)

    def prefetch(self, layer, chosen, newest, unit):
        """The rows of some units of a layer.

        Tokens beyond the cached ones or before the first visible one, and invalid units, are not held.
        """
        layers, batch, heads, size, dim = self.k.shape
        tokens = chosen.indices[..., None] * unit + jnp.arange(unit, dtype=jnp.int32)[None, None, None]
        held = chosen.valid[..., None] & (tokens < newest.cached[:, None, None, None])
        first = newest.first(layer)
        if first is not None:
            held &= tokens >= first[:, None, None, None]
        tokens, held = (a.reshape(batch, heads, -1) for a in (jnp.where(held, tokens, 0), held))
        row = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1)
        row = jnp.asarray(layer).astype(jnp.uint32) * np.uint32(batch * heads) + row
        place = row * np.uint32(size) + tokens.astype(jnp.uint32)

        @on_host
        def gather(k, v, place):
            k, v = (a.reshape(layers * batch * heads * size, dim) for a in (k, v))
            return tuple(a.at[place].get(mode="promise_in_bounds") for a in (k, v))

        return Fetched(*jax.device_put(gather(self.k, self.v, jax.device_put(place, HOST)), DEVICE), held)

    def sum_spans(self, lengths, size):
        """Sums of spans, formed on the host."""

        @on_host
        def run(k, v, held):
            return tuple(sum_spans(a, held) for a in (k, v))

        held = jax.device_put(held_tokens(self.capacity, lengths, size), HOST)
        return jax.device_put(run(self.k, self.v, held), DEVICE)

    def append(self, k, v, lengths):
        """The store with one more token a row."""
        near = self.near.append(k[:1], v[:1], lengths)
        *rows, size, dim = self.k.shape
        count = math.prod(rows)
        place = jnp.arange(count, dtype=jnp.uint32).reshape(rows) * np.uint32(size)
        place = place + lengths[None, :, None].astype(jnp.uint32)
        place = jnp.where((lengths < size)[None, :, None], place, np.uint32(count * size))  # a full row takes no more

        @on_host
        def write(cache, new, place):
            return cache.reshape(count * size, dim).at[place].set(new, mode="drop").reshape(cache.shape)

        new_k, new_v, place = jax.device_put((k.astype(self.k.dtype), v.astype(self.v.dtype), place), HOST)
        return HostStore(write(self.k, new_k, place), write(self.v, new_v, place), near)

    def append_chunk(self, k, v, start):
        """The store with the tokens start ... start + T - 1 of all rows."""
        near = self.near.append_chunk(k[:1], v[:1], start)

        @on_host
        def write(cache, new, start):
            return jax.lax.dynamic_update_slice_in_dim(cache, new, start, 3)

        new_k, new_v, start = jax.device_put((k.astype(self.k.dtype), v.astype(self.v.dtype), start), HOST)
        return HostStore(write(self.k, new_k, start), write(self.v, new_v, start), near)

    def put_row(self, row, number):
        """The store with another row in host memory in the place of row `number`."""
        near = self.near.put_row(row.near, number)

        @on_host
        def write(cache, new, number):
            return jax.lax.dynamic_update_slice_in_dim(cache, new, number, 1)

        number = jax.device_put(number, HOST)
        return HostStore(write(self.k, row.k, number), write(self.v, row.v, number), near)

    def _attend_set(self, view, q, chosen, newest, *, unit, implementation, sinks, spans, rows=None):
        rows = self.prefetch(view.index, chosen, newest, unit) if rows is None else rows
        place = jnp.broadcast_to(jnp.arange(rows.held.shape[-1], dtype=jnp.int32)[None, None], rows.held.shape)

        def run(q, k, v, new_k, new_v, indices, valid, sinks, *spans):
            options = dict(new_k=new_k, new_v=new_v, implementation=implementation, softcap=view.softcap)
            options |= dict(spans=Spans(*spans) if spans else None)
            return attend_chosen(q, k, v, Chosen(indices, valid), sinks, **options)

        batch, kv_heads = place.shape[:2]
        operands = ("bh-", "bh--", "bh--", "bh-", "bh-", "bh-", "bh-", "h")
        means = ()
        if spans is not None:
            operands += ("bh--", "bh--", "bh-")
            means = (*(jax.lax.dynamic_index_in_dim(a, view.index, keepdims=False) for a in spans[:2]), spans.counts)
        split = by_rows_and_heads(run, operands, "bh-", rows=batch, heads=kv_heads)
        return split(q, rows.k, rows.v, view.k[:, 0], view.v[:, 0], place, rows.held, sinks, *means)

    def _fetch_layer(self, index):
        """One layer on the device, [1, B, K, S, D] each."""

        @on_host
        def take(k, v, layer):
            return tuple(jax.lax.dynamic_slice_in_dim(a, layer, 1) for a in (k, v))

        return jax.device_put(take(self.k, self.v, jax.device_put(index, HOST)), DEVICE)


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` run on the host, with operands and results in its memory."""
    decorate = getattr(compute_on, "compute_on2", compute_on.compute_on)  # its name before jax 0.11
    return decorate(function, compute_type="device_host", out_memory_spaces=HOST)


def can_offload() -> bool:
    """Whether the default device can address pinned host memory."""
    return any(memory.kind == KIND for memory in jax.devices()[0].addressable_memories())


def offload(store: ResidentStore) -> HostStore:
    """Move concrete arrays to host memory, outside of jit, and leave a copy of layer 0 on the device.

    Nothing is donated: drop the argument to free the device.

    Raises:
        ValueError: The platform has no such memory.
    """
    host = _in_host_memory(store.k.sharding)
    return HostStore(*(jax.device_put(a, host) for a in (store.k, store.v)), ResidentStore(store.k[:1], store.v[:1]))


def zeros_on_host(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> HostStore:
    """A store of zeros, outside of jit. Of its layers, only layer 0 is ever on the devices of `sharding`.

    Raises:
        ValueError: The platform has no such memory.
    """
    host = _in_host_memory(sharding)
    far = (jax.device_put(np.zeros(shape, dtype), host) for _ in "kv")
    near = (jax.device_put(np.zeros((1, *shape[1:]), dtype), sharding) for _ in "kv")
    return HostStore(*far, ResidentStore(*near))


def _in_host_memory(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding in the memory of the host. Raises ValueError where the platform has none."""
    if not can_offload():
        kinds = ", ".join(memory.kind for memory in jax.devices()[0].addressable_memories())
        raise ValueError(f"offload needs {KIND} memory, and {jax.devices()[0].platform} has only {kinds}")
    return sharding.with_memory_kind(KIND)
