"""Means of the keys and values of spans, by which decoding estimates what it does not read (selection/tail.py)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.decoding.newest_tokens import Newest
from butler_jax.decoding.parts import parts_of
from butler_jax.decoding.store import KVStore, write_token
from butler_jax.model import LayerView
from butler_jax.selection import Chosen
from pallas_kernels import Spans


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpanMeans:
    """The means of each span of N tokens of a cache, on the device. The last tokens of S that fill no span have none.

    U is S // N, rounded up so that a mesh that splits the tokens splits the spans too.

    Attributes:
        k, v: Means, of the span that is being filled too.
        open_k, open_v: Sums of the span that is being filled, float32.
        size: N.
    """

    k: Float[Array, "L B K U D"]
    v: Float[Array, "L B K U D"]
    open_k: Float[Array, "L B K D"]
    open_v: Float[Array, "L B K D"]
    size: int = field(metadata={"static": True})

    @classmethod
    def of(cls, kv: KVStore, lengths: Int[Array, " B"], size: int) -> Self:
        """The means of rows that hold `lengths` tokens."""
        sums = kv.sum_spans(lengths, size)
        padding = ((0, 0),) * 3 + ((0, -sums[0].shape[3] % parts_of(kv.capacity)), (0, 0))
        sums = [jnp.pad(a, padding) for a in sums]
        count = jnp.arange(sums[0].shape[3], dtype=jnp.int32)[None] * size
        count = jnp.clip(lengths[:, None] - count, 1, size).astype(jnp.float32)[None, :, None, :, None]
        means = ((a / count).astype(kv.k.dtype) for a in sums)
        place = jnp.minimum(lengths // size, sums[0].shape[3] - 1)[None, :, None, None, None]
        return cls(*means, *(jnp.take_along_axis(a, place, axis=3)[:, :, :, 0] for a in sums), size)

    def append(self, k: Float[Array, "L B K D"], v: Float[Array, "L B K D"], lengths: Int[Array, " B"]) -> Self:
        """The means with one more token a row, at its length."""
        place = (lengths % self.size)[None, :, None, None]

        def add(means, opened, new):
            opened = jnp.where(place == 0, 0.0, opened) + new.astype(means.dtype).astype(jnp.float32)
            return write_token(means, opened / (place + 1), lengths // self.size), opened

        (k, open_k), (v, open_v) = add(self.k, self.open_k, k), add(self.v, self.open_v, v)
        return replace(self, k=k, v=v, open_k=open_k, open_v=open_v)

    def unread(self, view: LayerView, chosen: Chosen, newest: Newest, unit: int) -> Spans:
        """The spans that a layer attends for its newest tokens, by what these do not read; chosen: units [B, _, N]."""
        count, size = self.k.shape[3], self.size
        sets = chosen.indices.shape[:2]
        row, head = (jnp.arange(n, dtype=jnp.int32) for n in sets)
        read = jnp.zeros((*sets, count), jnp.int32)
        places = row[:, None, None], head[None, :, None], chosen.indices * unit // size
        read = read.at[places].add(chosen.valid * unit, mode="drop")
        begin = jnp.arange(count, dtype=jnp.int32)[None] * size
        whole = begin + size <= newest.cached[:, None]
        first = newest.first(view.index)
        if first is not None:
            whole &= begin >= first[:, None]
        return Spans(self.k, self.v, jnp.where(whole[:, None], size - read, 0))
