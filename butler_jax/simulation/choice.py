"""The keys that a chunk of rows reads, and attention over them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import CHUNK, PartialAttention, exponentials, weighted_values
from butler_jax.policies import Chunk, Scoring
from butler_jax.selection import (
    Limits,
    SelectionConfig,
    TailSpans,
    attend_spans,
    beyond,
    select_mask,
    weigh_units,
)


def sparse_chunk(chunk, *, policy: Scoring, limits: Limits, rule: SelectionConfig, softcap: float | None = None):
    """Attention of a chunk over its chosen keys, and over the tail where the rule has one; softcap: of the layer.

    Returns:
        The output [B, K, G, C, D], and the fractions of its causal keys that each row read: of all
        choosing heads together, [B, C], and of each, [B, heads, C].
    """
    mask, count = chosen_mask(chunk, lambda: policy(chunk.under(rule)), limits, rule)
    batch, kv_heads, _, size, keys = chunk.logits.shape
    read, held = jnp.sum(mask, axis=3, dtype=jnp.int32), jnp.maximum(count, 1)
    fraction = jnp.sum(read, axis=1).astype(jnp.float32) / (mask.shape[1] * held).astype(jnp.float32)
    shares = read.astype(jnp.float32) / held.astype(jnp.float32)[:, None]
    mask = mask.reshape(batch, kv_heads, -1, size, keys)  # 1 or G sets in a group
    weights, total, lse = exponentials(chunk.logits, mask, chunk.sink_logits)
    output = weighted_values(weights, chunk.v) / total
    if 0 < rule.tail <= keys:
        output = PartialAttention(output, lse[..., 0]).merge(_estimate_tail(chunk, mask, rule.tail, softcap)).output
    return output.astype(chunk.v.dtype), fraction, shares


def _estimate_tail(chunk: Chunk, mask: Bool[Array, "B K _ C S"], size: int, softcap: float | None) -> PartialAttention:
    """Attention of a chunk over the keys that its rows do not read, by means of spans."""
    spans = TailSpans.find(chunk.columns, chunk.starts, size)
    sets = mask.reshape(mask.shape[0], -1, *mask.shape[3:])
    unread = spans.unread(sets, chunk.allowed, chunk.rows, chunk.columns)
    unread = unread.reshape(*mask.shape[:4], -1)
    return attend_spans(chunk.q, spans.means(chunk.k), spans.means(chunk.v), unread, softcap)


def chosen_mask(
    chunk: Chunk, score: Callable[[], Float[Array, "B K C S"]], limits: Limits, rule: SelectionConfig
) -> tuple[Bool[Array, "B K C S"], Int[Array, "B C"]]:
    """The keys that the chunk's rows read, and how many they may see.

    Layers that are not served read everything, and prompts do. A chunk whose rows all read everything is not scored.

    With an interval, the rows at its multiples choose, and the first row after a prompt. The others read what was
    chosen then. Decoding counts from the prompt on: it chooses at the same rows where the prompt is a multiple.

    Raises:
        ValueError: The interval does not divide the rows of a chunk.
    """
    if CHUNK % rule.interval:
        raise ValueError(f"the simulation chooses every 1, 2, 4, ... {CHUNK} rows; the interval is {rule.interval}")
    allowed = jnp.broadcast_to(chunk.allowed, (chunk.q.shape[0], *chunk.allowed.shape[1:]))[:, None]
    count = jnp.sum(allowed[:, 0], axis=-1, dtype=jnp.int32)
    served = chunk.layer > 0 if limits.served is None else limits.served[chunk.layer]
    limited = served & (chunk.rows.own - chunk.rows.start >= _prompts(limits))
    tokens = jnp.where(limited, limits.table[count], count)

    def choose():
        scores, threshold = score(), None
        if limits.threshold is not None:
            threshold = jnp.where(limited[:, None], limits.threshold[chunk.layer][None, :, None], -jnp.inf)
            threshold = beyond(limits.min_context, count[:, None], threshold)
        if rule.allocation == "top_p":
            weighed = weigh_units(scores, allowed, chunk.rows, rule, chunk.columns)
            scores, threshold = weighed.scores, weighed.threshold(threshold)
        mask = select_mask(scores, allowed, chunk.rows, tokens, rule, columns=chunk.columns, threshold=threshold)
        if rule.interval > 1:
            mask = jnp.where(limited[:, None, :, None], _held(mask, chunk, limits, rule), mask) & allowed
        return mask

    def read_all():
        return jnp.broadcast_to(allowed, jax.eval_shape(score).shape)

    less = limited if rule.interval > 1 or limits.threshold is not None else tokens < count
    return jax.lax.cond(jnp.any(less), choose, read_all), count


def _held(mask: Bool[Array, "B K C S"], chunk: Chunk, limits: Limits, rule: SelectionConfig) -> Bool[Array, "B K C S"]:
    """What rows read under an interval: the last choice, and all tokens since."""
    own = chunk.rows.own
    since = jnp.minimum(own % rule.interval, jnp.maximum(own - chunk.rows.start - _prompts(limits), 0))
    then = jnp.arange(own.shape[1], dtype=jnp.int32)[None] - since  # the row of the choice, in the same chunk
    before = jnp.take_along_axis(mask, then[:, None, :, None], axis=2)
    return before | (chunk.columns[None, None] > (own - since)[..., None])[:, None]


def _prompts(limits: Limits) -> Int[Array, "_ 1"]:
    """Tokens of the prompt of each sequence."""
    return jnp.zeros((1, 1), jnp.int32) if limits.prompts is None else limits.prompts[:, None]
