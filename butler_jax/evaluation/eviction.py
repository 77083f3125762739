"""Policies that evict, simulated: row after row, for what a row attends depends on what all earlier rows kept."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.attention import document_starts
from butler_jax.base_model import LayerView
from butler_jax.configs import SelectionConfig
from butler_jax.policies.evicting import Evicting, evict
from butler_jax.selection import Limits, Rows, always_chosen


class Evicted(NamedTuple):
    """A layer under a policy that evicts.

    output: attention over what was kept. fraction: of its causal keys that a row read, mean over KV heads. mass: true
    attention weight inside the set kept, mean over query heads. kept: what the last row kept, itself included.
    """

    output: Float[Array, "B T H D"]
    fraction: Float[Array, "B T"]
    mass: Float[Array, "B T"]
    kept: Bool[Array, "B K T"]


def evicting_attention(
    view: LayerView,
    segments: Int[Array, "B T"],
    window: int | None,
    policy: Evicting,
    limits: Limits,
    rule: SelectionConfig,
) -> Evicted:
    """One layer, rows in order. window: of a sliding layer. Layer 0 and rows up to min_context keep everything."""
    batch, length, heads, dim = view.q.shape
    kv_heads = view.k.shape[2]
    columns = jnp.arange(length, dtype=jnp.int32)
    starts = document_starts(segments)
    queries = (view.q * jnp.asarray(dim**-0.5, view.q.dtype)).reshape(batch, length, kv_heads, -1, dim)
    keys, values = (jnp.swapaxes(a, 1, 2) for a in (view.k, view.v))

    def softmax(logits, mask):
        return jax.nn.softmax(jnp.where(mask[:, :, None], logits, -1e30), axis=-1)

    def row(carry, inputs):
        kept, memory = carry
        q, start, t = inputs
        low = start if window is None else jnp.maximum(start, t - window + 1)
        allowed = (columns[None] >= low[:, None]) & (columns[None] <= t)
        count = t - low + 1
        budget = jnp.where(view.index > 0, limits.table[count], count)
        own = jnp.broadcast_to(t, (batch, 1))
        newest = columns[None] > (t - policy.recent(budget))[:, None]
        protected = newest | always_chosen(Rows(own, start[:, None]), columns, rule.sinks, rule.window)[:, 0]
        candidates = (kept | (columns == t)[None, None]) & allowed[:, None]
        kept = evict(candidates, policy.worth(memory), protected, budget)
        logits = jnp.einsum("bkgd,bksd->bkgs", q, keys, preferred_element_type=jnp.float32)
        weights = softmax(logits, kept)
        out = jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        memory = policy.observe(memory, jnp.sum(weights, axis=2), t)
        read = jnp.mean(jnp.sum(kept, axis=-1, dtype=jnp.int32).astype(jnp.float32), axis=-1)
        true = softmax(logits, jnp.broadcast_to(allowed[:, None], kept.shape))
        mass = jnp.mean(jnp.sum(jnp.where(kept[:, :, None], true, 0.0), axis=-1), axis=(1, 2))
        return (kept, memory), (out.astype(values.dtype), read / count.astype(jnp.float32), mass)

    shape = (batch, kv_heads, length)
    rows = jnp.swapaxes(queries, 0, 1), jnp.swapaxes(starts, 0, 1), columns
    (kept, _), (out, fraction, mass) = jax.lax.scan(row, (jnp.zeros(shape, bool), policy.begin(shape)), rows)
    out = jnp.swapaxes(out, 0, 1).reshape(batch, length, heads, -1)
    return Evicted(out, jnp.swapaxes(fraction, 0, 1), jnp.swapaxes(mass, 0, 1), kept)
