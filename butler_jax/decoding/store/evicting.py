"""Keys and values under a policy that evicts: what was dropped stays in the arrays and is never read."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.decoding.store.base import KVStore
from butler_jax.model import grouped_sinks, masked_softmax, sink_logits, soft_cap
from butler_jax.selection import Chosen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EvictingStore(KVStore):
    """A resident store whose attention also gives the weights, from which the policy learns what a token is worth."""

    evicting = True
    page = 1

    def attend(self, view, chosen, newest, *, unit, rows, implementation, spans=None):
        """Attend to the tokens kept, the new one among them; weights are summed over the group."""
        batch, _, heads, dim = view.q.shape
        kv_heads = view.k.shape[2]
        k, v = (self._rows(a, b, view.index, chosen, newest.cached) for a, b in ((self.k, view.k), (self.v, view.v)))
        q = view.q.reshape(batch, kv_heads, heads // kv_heads, dim)
        logits = jnp.einsum("bkgd,bknd->bkgn", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        sinks = grouped_sinks(sink_logits(view.weights), kv_heads, rows=False)
        weights = masked_softmax(soft_cap(logits, view.softcap), chosen.valid[:, :, None], sinks)
        out = jnp.einsum("bkgn,bknd->bkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        places = jnp.where(chosen.valid, chosen.indices, self.capacity)
        spread = jnp.zeros((batch, kv_heads, self.capacity), jnp.float32)
        spread = spread.at[*_rows_and_heads(chosen), places].set(jnp.sum(weights, axis=2), mode="drop")
        return out.reshape(view.q.shape).astype(view.q.dtype), spread

    def _rows(
        self,
        cache: Float[Array, "L B K S D"],
        new: Float[Array, "B 1 K D"],
        layer: Int[Array, ""],
        chosen: Chosen,
        cached: Int[Array, " B"],
    ) -> Float[Array, "B K N D"]:
        """Rows of the chosen tokens: of the cache, and of the new token, which the cache does not hold yet."""
        rows = cache[layer, *_rows_and_heads(chosen), chosen.indices].astype(new.dtype)
        own = (chosen.indices == cached[:, None, None])[..., None]
        return jnp.where(own, new[:, 0, :, None], rows)


def _rows_and_heads(chosen: Chosen) -> tuple[Int[Array, "B 1 1"], Int[Array, "1 K 1"]]:
    """Indices of the first two axes of `chosen`, to index beside the third."""
    batch, kv_heads, _ = chosen.indices.shape
    return jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
