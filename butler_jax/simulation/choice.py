"""The keys that a chunk of rows reads, and attention over them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import exponentials, weighted_values
from butler_jax.policies import Chunk, Scoring
from butler_jax.selection import Limits, SelectionConfig, beyond, select_mask


def sparse_chunk(chunk, *, policy: Scoring, limits: Limits, rule: SelectionConfig):
    """Attention of a chunk over its chosen keys.

    Returns:
        The output [B, K, M, D] of M = G C rows, and the fraction of its causal keys that each row read, [B, C].
    """
    mask, count = chosen_mask(chunk, policy(with_rule(chunk, rule)), limits, rule)
    batch, kv_heads, group, size, keys = chunk.logits.shape
    read = jnp.sum(mask, axis=(1, 3), dtype=jnp.int32)
    fraction = read.astype(jnp.float32) / (mask.shape[1] * jnp.maximum(count, 1)).astype(jnp.float32)
    mask = mask.reshape(batch, kv_heads, -1, size, keys)  # 1 or G sets in a group
    weights, total, _ = exponentials(chunk.logits, mask)
    output = weighted_values(weights.reshape(batch, kv_heads, group * size, keys), chunk.v)
    output = output / total.reshape(batch, kv_heads, group * size, 1)
    return output.astype(chunk.v.dtype), fraction


def with_rule(chunk: Chunk, rule: SelectionConfig) -> Chunk:
    """The chunk with the numbers of sinks and recent tokens of the selection."""
    return chunk._replace(sinks=rule.sinks, recent=rule.recent)


def chosen_mask(
    chunk: Chunk, scores: Float[Array, "B K C S"], limits: Limits, rule: SelectionConfig
) -> tuple[Bool[Array, "B K C S"], Int[Array, "B C"]]:
    """The keys that the chunk's rows read, and how many they may see. Layer 0 and prompts read everything."""
    allowed = jnp.broadcast_to(chunk.allowed, (chunk.q.shape[0], *chunk.allowed.shape[1:]))[:, None]
    count = jnp.sum(allowed[:, 0], axis=-1, dtype=jnp.int32)
    limited = (chunk.layer > 0) & (chunk.rows.own - chunk.rows.start >= _prompts(limits))
    tokens = jnp.where(limited, limits.table[count], count)
    threshold = None
    if limits.threshold is not None:
        threshold = jnp.where(limited[:, None], limits.threshold[chunk.layer][None, :, None], -jnp.inf)
        threshold = beyond(limits.min_context, count[:, None], threshold)
    mask = select_mask(scores, allowed, chunk.rows, tokens, rule, columns=chunk.columns, threshold=threshold)
    return mask, count


def _prompts(limits: Limits) -> Int[Array, "_ 1"]:
    """Tokens of the prompt of each sequence."""
    return jnp.zeros((1, 1), jnp.int32) if limits.prompts is None else limits.prompts[:, None]
