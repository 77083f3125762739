"""Dense attention of new tokens over a cache that they are not in yet: a few queries a row, block by block of keys."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.decoding.parts import Part, part_of
from butler_jax.model import LOWEST, grouped_sinks, soft_cap
from butler_jax.parallel import by_rows_and_heads, platform, token_axis

BLOCK = 1024  # cached keys looked at together on CPU: they stay in its caches
LOGITS = 2**27  # logits formed together elsewhere, where few large products are fast


def attend_cached(
    q: Float[Array, "B T H D"],
    new_k: Float[Array, "B T K D"],
    new_v: Float[Array, "B T K D"],
    k: Float[Array, "L B K S D"],
    v: Float[Array, "L B K S D"],
    layer: Int[Array, ""] | int,
    cached: Int[Array, " B"],
    sliding_window: Int[Array, ""] | int | None = None,
    *,
    softcap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H D"]:
    """Attention of tokens at positions cached ... cached + T - 1 over the `cached` ones of `layer` and themselves.

    Causal among the new ones. sliding_window: a token sees itself and the sliding_window - 1 before it; may be traced.
    As many blocks are read as the longest row holds. Where each row has one new token, a CPU reads of each row only as
    many as that row holds. No layer is copied out of the cache. Float32 sums; result in q's dtype. A row of length 0
    sees itself and the new tokens before it; logits that are not finite count as in causal_attention, and so do softcap
    and sink_logits. Where the current mesh splits the cache's tokens, every device attends to its part of them.
    """
    size = k.shape[3]
    axis = token_axis(size)
    if axis is None:
        return _attend(q, new_k, new_v, k, v, layer, cached, sliding_window, sink_logits, None, softcap)

    def run(q, new_k, new_v, k, v, layer, cached, sliding_window, sink_logits):
        part = part_of(k.shape[3], axis)
        return _attend(q, new_k, new_v, k, v, layer, cached, sliding_window, sink_logits, part, softcap)

    operands = ("b-h-", "b-h-", "b-h-", "-bhs-", "-bhs-", "", "b", "", "h")
    split = by_rows_and_heads(run, operands, "b-h-", rows=q.shape[0], heads=k.shape[2], tokens=size)
    return split(q, new_k, new_v, k, v, layer, cached, sliding_window, sink_logits)


def _attend(q, new_k, new_v, k, v, layer, cached, sliding_window, sink_logits, part: Part | None, softcap):
    """attend_cached over the tokens of one part of a cache, merged with the other parts."""
    batch, count, heads, dim = q.shape
    kv_heads, size = k.shape[2:4]
    begin, here = (0, cached) if part is None else (part.begin, part.count(cached))
    on_cpu = platform() == "cpu"
    block = BLOCK if on_cpu else max(BLOCK, LOGITS // (batch * heads * count))
    block = min(block, size)
    rows = q.reshape(batch, count, kv_heads, heads // kv_heads, dim)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, heads // kv_heads * count, dim)
    own = cached[:, None] + jnp.arange(count, dtype=jnp.int32)[None]  # [B, T]

    def add(state, queries, newest, keys, values, positions, held):
        """Some rows' state with one more set of their keys [N, K, S, D], at positions [S] or [N, S].

        newest [N, T]: positions of their queries. held [N, 1 or T, S]: which of the keys exist.
        """
        top, total, sums = state
        seen = held & (positions[:, None] <= newest[..., None])
        if sliding_window is not None:
            seen = seen & (positions[:, None] > newest[..., None] - sliding_window)
        logits = jnp.einsum("bkmd,bksd->bkms", queries, keys, preferred_element_type=jnp.float32) * dim**-0.5
        split = soft_cap(logits, softcap).reshape(*logits.shape[:2], -1, count, keys.shape[2])
        logits = jnp.where(seen[:, None, None], split, -jnp.inf).reshape(logits.shape)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(logits - higher), jnp.exp(top - higher)
        part = jnp.einsum("bkms,bksd->bkmd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return higher, total * shrink + jnp.sum(weights, axis=-1, keepdims=True), sums * shrink + part

    def add_block(number, state, first=0, many=batch):
        """The state with one more block of `many` rows from the row `first` on."""
        of = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=many)
        start = jnp.minimum(number * block, size - block)
        keys, values = (
            jax.lax.dynamic_slice(a, (layer, first, 0, start, 0), (1, many, kv_heads, block, dim))[0].astype(q.dtype)
            for a in (k, v)
        )
        places = (start + jnp.arange(block, dtype=jnp.int32))[None]
        held = (places >= number * block) & (places < of(here)[:, None])
        new = add(jax.tree.map(of, state), of(rows), of(own), keys, values, begin + places, held[:, None])
        return jax.tree.map(partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0), state, new)

    def add_block_of_row(number, state):
        """The state with one more block of one row; `number` counts the blocks of all rows."""
        row = jnp.searchsorted(ends, number, side="right")
        return add_block(number - ends[row] + blocks[row], state, row, 1)

    shape = (*rows.shape[:-1], 1)
    state = jnp.full(shape, LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(rows.shape, jnp.float32)
    blocks = -(-here // block)
    if on_cpu and count == 1 and batch > 1:
        ends = jnp.cumsum(blocks)
        state = jax.lax.fori_loop(0, ends[-1], add_block_of_row, state)
    elif count == 1 and block == size:  # a step of decoding has one round, which a GPU would have to tell the host
        state = add_block(0, state)
    else:  # the first chunk of a prompt has none
        state = jax.lax.fori_loop(0, jnp.max(blocks), add_block, state)
    if part is not None:
        state = part.merged(*state)
    fresh_k, fresh_v = (a.transpose(0, 2, 1, 3).astype(q.dtype) for a in (new_k, new_v))
    everywhere = jnp.ones((1, 1, count), bool)  # every row sees itself
    top, total, sums = add(state, rows, own, fresh_k, fresh_v, own, everywhere)
    if sink_logits is not None:
        sinks = jnp.repeat(grouped_sinks(sink_logits, kv_heads, rows=False), count, axis=2)
        higher = jnp.maximum(top, sinks)
        shrink = jnp.exp(top - higher)
        total, sums = total * shrink + jnp.exp(sinks - higher), sums * shrink
    out = (sums / jnp.where(total == 0, 1.0, total)).reshape(batch, kv_heads, heads // kv_heads, count, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
