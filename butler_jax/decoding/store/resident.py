"""Keys and values on the device."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from butler_jax.decoding.store.base import CACHE_LETTERS, KVStore
from butler_jax.parallel import by_rows_and_heads
from pallas_kernels import masked_topk_decode_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidentStore(KVStore):
    """All tokens of a row lie on the device that decodes it; a mesh splits rows and KV heads."""

    def _attend_set(self, view, q, chosen, newest, *, unit, implementation, rows=None):
        def run(q, k, v, new_k, new_v, indices, valid, lengths, first, layer):
            options = dict(unit=unit, layer=layer, implementation=implementation)
            options.update(new_k=new_k, new_v=new_v, lengths=lengths, first=first)
            return masked_topk_decode_attention(q, k, v, indices, valid, **options)

        return self._split(run)(
            q, self.k, self.v, view.k[:, 0], view.v[:, 0], *chosen, newest.cached, newest.first(view.index), view.index
        )

    def _split(self, run):
        """`run` on every device's own rows and heads; see `parallel.by_rows_and_heads`."""
        _, batch, kv_heads, size, _ = self.k.shape
        operands = ("bh-", CACHE_LETTERS, CACHE_LETTERS, "bh-", "bh-", "bh-", "bh-", "b", "b", "")
        return by_rows_and_heads(run, operands, "bh-", rows=batch, heads=kv_heads, tokens=size)
