"""Keys and values whose tokens are split over devices: every device attends to its part, and the parts are merged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from butler_jax.decoding.parts import attend_new, part_of, parts_of
from butler_jax.decoding.store.base import PAGE, merge_sinks
from butler_jax.decoding.store.resident import ResidentStore
from butler_jax.model import PartialAttention
from butler_jax.parallel import token_axis
from pallas_kernels import masked_topk_decode_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShardedStore(ResidentStore):
    """An axis of the current mesh splits the tokens of every row."""

    @property
    def page(self):
        """Tokens that are read together of a sliding window; a part of the cache holds whole ones."""
        return math.gcd(self.capacity // parts_of(self.capacity), PAGE)

    def _attend_own(self, q, k, v, new_k, new_v, chosen, *, lengths, first, unit, sinks, softcap, **where):
        part = part_of(k.shape[-2], token_axis(self.capacity))
        seen = dict(lengths=part.count(lengths), first=None if first is None else part.count(first))
        own = part.own(chosen, unit)
        where |= dict(unit=unit, softcap=softcap, return_residual=True)
        found = part.joined(PartialAttention(*masked_topk_decode_attention(q, k, v, *own, **seen, **where)))
        found = found.merge(attend_new(q, new_k, new_v, softcap))
        return merge_sinks(found, sinks).output.astype(q.dtype)


def make_store(k: Float[Array, "L B K S D"], v: Float[Array, "L B K S D"]) -> ResidentStore:
    """The store of these arrays: sharded where the current mesh splits their tokens, resident elsewhere."""
    kind = ResidentStore if token_axis(k.shape[3]) is None else ShardedStore
    return kind(k, v)
