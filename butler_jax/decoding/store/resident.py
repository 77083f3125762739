"""Keys and values on the device."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from butler_jax.decoding.store.base import CACHE_LETTERS, KVStore, attend_chosen
from butler_jax.parallel import by_rows_and_heads
from butler_jax.selection import Chosen
from pallas_kernels import Spans


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidentStore(KVStore):
    """All tokens of a row lie on the device that decodes it; a mesh splits rows and KV heads."""

    def _attend_set(self, view, q, chosen, newest, *, unit, implementation, sinks, spans, rows=None):
        def run(q, k, v, new_k, new_v, indices, valid, lengths, first, layer, sinks, *spans):
            where = dict(lengths=lengths, first=first, layer=layer, unit=unit, implementation=implementation)
            where |= dict(sinks=sinks, softcap=view.softcap, spans=Spans(*spans) if spans else None)
            return self._attend_own(q, k, v, new_k, new_v, Chosen(indices, valid), **where)

        _, batch, kv_heads, size, _ = self.k.shape
        operands = ("bh-", CACHE_LETTERS, CACHE_LETTERS, "bh-", "bh-", "bh-", "bh-", "b", "b", "", "h")
        operands += () if spans is None else (CACHE_LETTERS, CACHE_LETTERS, "bhs")
        split = by_rows_and_heads(run, operands, "bh-", rows=batch, heads=kv_heads, tokens=size)
        arrays, seen = (q, self.k, self.v, view.k[:, 0], view.v[:, 0]), (newest.cached, newest.first(view.index))
        return split(*arrays, *chosen, *seen, view.index, sinks, *(spans or ()))

    def _attend_own(self, q, k, v, new_k, new_v, chosen: Chosen, *, sinks, **where) -> Float[Array, "B H D"]:
        """Attention on one device, over its own rows and heads."""
        return attend_chosen(q, k, v, chosen, sinks, new_k=new_k, new_v=new_v, **where)
