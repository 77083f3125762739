"""Policies that evict, row after row: what a row attends depends on what all earlier rows kept.

`evict_row` is the rule. `evict_rows` runs it over whole sequences, for simulation, recall and prefill; decoding runs it
for one token a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import (
    CHUNK,
    grouped_sinks,
    make_bands,
    masked_softmax,
    merge_queries,
    soft_cap,
    split_keys,
    split_queries,
    weighted_values,
)
from butler_jax.policies import Evicting, Place, evict
from butler_jax.selection import Rows, SelectionConfig


class Eviction(NamedTuple):
    """What a layer has kept, per KV head, and what its policy remembers; of all layers, L comes first."""

    kept: Bool[Array, "B K S"]
    memory: Any


class EvictedRows(NamedTuple):
    """A layer's rows under several budgets: the sequences of the first budget come first.

    output: attention over what was kept. read: tokens kept, mean over KV heads. mass: true attention weight inside the
    set kept, mean over query heads. state: after the last row. output and mass are None where they are not asked.
    """

    output: Float[Array, "budgets*B T H D"] | None
    read: Float[Array, "budgets*B T"]
    mass: Float[Array, "budgets*B T"] | None
    state: Eviction


def nothing_kept(policy: Evicting, shape: tuple[int, int, int]) -> Eviction:
    """Before the first row; shape: [B, K, S]."""
    return Eviction(jnp.zeros(shape, bool), policy.begin(shape))


def row_axes(policy: Evicting) -> Any:
    """The axis of the rows B in every array of the policy's memory of a layer."""
    few, more = (jax.eval_shape(lambda n=n: policy.begin((n, 1, 1))) for n in (2, 3))
    return jax.tree.map(lambda a, b: [x == y for x, y in zip(a.shape, b.shape, strict=True)].index(False), few, more)


def grown(policy: Evicting, state: Eviction, size: int) -> Eviction:
    """The same with room for `size` tokens."""
    larger = nothing_kept(policy, (*state.kept.shape[:2], size))
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, (0,) * a.ndim), larger, state)


def evict_row(
    policy: Evicting,
    state: Eviction,
    place: Place,
    low: Int[Array, " B"],
    budget: Int[Array, " B"],
    rule: SelectionConfig,
) -> Bool[Array, "B K S"]:
    """What is kept after one more row of every sequence: its token comes, the one worth least goes.

    low: the first column that each row may see. budget: tokens that it may keep. rule: its sinks and recent tokens are
    never dropped.
    """
    columns = jnp.arange(state.kept.shape[-1], dtype=jnp.int32)[None]
    own = place.own[:, None]
    newest = jnp.maximum(jnp.minimum(policy.recent(budget), budget - rule.sinks), rule.recent)[:, None]
    protected = (columns > own - newest) | (columns < place.start[:, None] + rule.sinks)
    allowed = (columns >= low[:, None]) & (columns <= own)
    candidates = (state.kept | (columns == own)[:, None]) & allowed[:, None]
    return evict(candidates, policy.worth(state.memory), protected, budget)


def evict_rows(
    policy: Evicting,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    rows: Rows,
    budgets: Int[Array, "budgets B T"],
    sliding_window: int | None,
    rule: SelectionConfig,
    *,
    output: bool = True,
    mass: bool = False,
    softcap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
) -> EvictedRows:
    """All rows of a layer in order, under N budgets of each row in tokens.

    rows: columns of the queries, no later than their own index; below 0 they mean nothing. sliding_window: the layer's.
    softcap, sink_logits: as in `model.causal_attention`. Only what depends on earlier rows runs row by row: logits,
    outputs and true attention are formed for 128 rows at a time, whatever the budgets, and memory is linear in length.
    """
    (batch, length, heads, dim), kv_heads, count = q.shape, k.shape[2], budgets.shape[0]
    size = min(CHUNK, length)
    pad = -length % size  # in front: the state after the last row is one that can go on
    chunks = (length + pad) // size
    front = ((0, 0), (pad, 0))
    queries = split_queries(jnp.pad(q, (*front, (0, 0), (0, 0))), kv_heads, size)
    keys, values = (split_keys(a, 1) for a in (k, v))
    own, start = jnp.pad(rows.own, front, constant_values=-1), jnp.pad(rows.start, front)
    low = start if sliding_window is None else jnp.maximum(start, own - sliding_window + 1)
    budgets = jnp.pad(budgets, ((0, 0), *front)).reshape(count * batch, -1)

    sinks, sinks_of_row = (grouped_sinks(sink_logits, kv_heads, rows=rows) for rows in (True, False))

    def split(a):
        return a.T.reshape(chunks, size, -1)

    def repeat(a):
        return jnp.broadcast_to(a[None], (count, *a.shape)).reshape(-1, *a.shape[1:])

    def chunk(keys, values, state, inputs):
        q, places = inputs
        logits = jnp.einsum("bkmd,bksd->bkms", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
        logits = soft_cap(logits, softcap).reshape(batch, kv_heads, -1, size, keys.shape[2])
        true = _group_weights(logits, places[0], places[2], sinks) if mass else None

        def row(state, inputs):
            number, own, start, low, budget = inputs
            mine = repeat(jax.lax.dynamic_index_in_dim(logits, number, 3, keepdims=False))
            place = Place(repeat(own), repeat(start))
            kept = evict_row(policy, state, place, repeat(low), budget, rule)
            weights = masked_softmax(mine, kept[:, :, None], sinks_of_row)
            state = Eviction(kept, policy.observe(state.memory, jnp.sum(weights, axis=2), place, budget))
            read = jnp.sum(state.kept, axis=(1, 2), dtype=jnp.int32).astype(jnp.float32) / kv_heads
            inside = None
            if mass:
                seen = repeat(jax.lax.dynamic_index_in_dim(true, number, 2, keepdims=False))
                inside = jnp.sum(jnp.where(state.kept, seen, 0.0), axis=(1, 2)) / heads
            return state, (weights if output else None, read, inside)

        numbers = jnp.arange(size, dtype=jnp.int32)
        state, (weights, read, inside) = jax.lax.scan(row, state, (numbers, *places))
        out = None
        if output:
            weights = jnp.moveaxis(weights, 0, 3).reshape(count * batch, kv_heads, -1, keys.shape[2])
            out = weighted_values(weights, repeat(values)).astype(values.dtype)
        return state, (out, read, inside)

    state, parts = None, []
    everything = (queries, tuple(map(split, (own, start, low, budgets))))
    for band in make_bands(chunks, size, None):
        seen = band.keys - pad
        state = grown(policy, state, seen) if parts else nothing_kept(policy, (count * batch, kv_heads, seen))
        part = jax.tree.map(lambda a, band=band: a[band.start : band.stop], everything)
        step = lambda state, inputs, seen=seen: chunk(keys[:, :, :seen], values[:, :, :seen], state, inputs)  # noqa: E731
        state, found = jax.lax.scan(step, state, part)
        parts.append(found)
    out, read, inside = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    read, inside = (None if a is None else a.reshape(chunks * size, -1).T[:, pad:] for a in (read, inside))
    if output:
        out = merge_queries(out, size, chunks * size)[:, pad:]
    return EvictedRows(out, read, inside, state)


def _group_weights(
    logits: Float[Array, "B K G C S"],
    own: Int[Array, "C B"],
    low: Int[Array, "C B"],
    sinks: Float[Array, "1 K G 1 1"] | None,
) -> Float[Array, "B K C S"]:
    """True attention of a chunk's rows, summed over the group."""
    columns = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
    allowed = (columns >= low.T[..., None]) & (columns <= own.T[..., None])
    return jnp.sum(masked_softmax(logits, allowed[:, None, None], sinks), axis=2)
