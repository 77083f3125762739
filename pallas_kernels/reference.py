"""The definition of what the kernels compute, written for reading: sorts, gathers and softmax in jax.numpy.

Arguments are those of `api.py` after its checks. The other implementations are tested against these functions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arithmetic import soft_cap

LOWEST = -1e30  # logits below it count as -inf; it is finite, so that rows that see nothing give no NaN


def take_layer(array, layer):
    """One layer of a cache [L, B, ...], or the array itself where layer is None; of layers [P], rows [B*P, ...]."""
    if np.ndim(layer) == 1:
        return jnp.swapaxes(array[jnp.asarray(layer)], 0, 1).reshape(-1, *array.shape[2:])
    return array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


def seen(size, lengths, first):
    """bool [B, S]: the positions first[b] ... lengths[b] - 1."""
    positions = jnp.arange(size, dtype=jnp.int32)[None]
    mask = positions < lengths[:, None]
    return mask if first is None else mask & (positions >= first[:, None])


def per_head(k_imp, scales):
    """k_imp [B, Q, R, S] in float32 with its scales [Q] or [B, Q] applied; without scales it is unchanged."""
    if scales is None:
        return k_imp
    scales = jnp.broadcast_to(scales, k_imp.shape[:2]).astype(jnp.float32)
    return k_imp.astype(jnp.float32) * scales[:, :, None, None]


def head_scores(q_imp, k_imp, lengths, *, scales, scale, first, layer):
    """Scores of every query head, float32 [B, K, G, S]; -inf for tokens not seen and for products that are NaN."""
    batch, heads, group, rank = q_imp.shape
    k_imp = per_head(take_layer(k_imp, layer), scales)
    if k_imp.shape[1] == heads:  # shared by the group
        k_imp = jnp.repeat(k_imp, group, axis=1)
    k_imp = k_imp.reshape(batch, heads, group, rank, -1).astype(jnp.float32)
    scores = jnp.einsum("bkgr,bkgrs->bkgs", q_imp.astype(jnp.float32), k_imp, precision="highest") * scale
    mask = seen(scores.shape[-1], lengths, first)[:, None, None] & ~jnp.isnan(scores)
    return jnp.where(mask, scores, -jnp.inf)


def importance_totals(q_imp, k_imp, lengths, **options):
    """Log-sum-exps over the tokens that a row sees, float32 [B, K, G]."""
    return jax.nn.logsumexp(head_scores(q_imp, k_imp, lengths, **options), axis=-1)


def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, offset, **options):
    """Scores pooled over the group, float32 [B, K, S]; -inf for tokens not seen."""
    scores = head_scores(q_imp, k_imp, lengths, **options)
    if normalised:
        totals = jax.nn.logsumexp(scores, axis=-1) if totals is None else totals
        scores = scores - jnp.where(jnp.isfinite(totals), totals, 0.0)[..., None]
        scores = scores if offset is None else scores + offset[..., None]
    return jnp.max(scores, axis=2)


def ranked(scores, lengths, rules):
    """The order of the choice (forced, best), and which units may be chosen (may), each [B, K, U].

    The newest `recent` tokens come before every score, the newest first, and then the first `sinks`, the earliest
    first. A unit counts as its best token. NaN counts as -inf.
    """
    sinks, recent, unit, first, threshold = rules
    size = scores.shape[-1]
    positions = jnp.arange(size, dtype=jnp.int32)[None]
    age = lengths[:, None] - 1 - positions
    may = seen(size, lengths, first)
    newest = may & (age < recent)
    early = may & (positions < sinks) & ~newest
    forced = jnp.where(newest, recent + sinks - age, jnp.where(early, sinks - positions, 0))  # [B, S]
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    may = jnp.broadcast_to(may[:, None], scores.shape)
    forced = jnp.broadcast_to(forced[:, None], scores.shape)
    if threshold is not None:
        limit = jnp.broadcast_to(threshold, scores.shape[:2]).astype(jnp.float32)[..., None]
        may = may & (~(scores < limit) | (forced > 0))  # nothing is below NaN
    padding = ((0, 0), (0, 0), (0, -size % unit))

    def reduce(values, empty):
        padded = jnp.pad(values, padding, constant_values=empty)
        return jnp.max(padded.reshape(*scores.shape[:2], -1, unit), axis=-1)

    may_unit = reduce(may, False)
    return reduce(forced, 0), reduce(jnp.where(may, scores, -jnp.inf), -jnp.inf), may_unit


def select_top_k(scores, lengths, n, *, counts, rules):
    """(indices, valid) [B, K, N] by a full sort: forced units first, then by score, then by position."""
    forced, best, may = ranked(scores, lengths, rules)
    units = may.shape[-1]
    position = jnp.broadcast_to(jnp.arange(units, dtype=jnp.int32)[None, None], may.shape)
    best = jnp.where(best == 0, 0.0, best)  # -0 is 0
    keys = ((~may).astype(jnp.int32), -forced, -best, position)
    order = jax.lax.sort(keys, dimension=-1, num_keys=4)[3][..., :n]
    held = jnp.sum(may, axis=-1, dtype=jnp.int32)
    taken = jnp.minimum(held, wanted(counts, n, may.shape[:2]))[..., None]
    slot = jnp.arange(n, dtype=jnp.int32)[None, None]
    chosen = jnp.sort(jnp.where(slot < taken, order, units), axis=-1)
    valid = slot < taken
    return jnp.where(valid, chosen, 0), valid


def wanted(counts, n, rows):
    """How many units each row asks for, 0 ... n, int32 [B, K]."""
    if counts is None:
        return jnp.full(rows, n, jnp.int32)
    counts = jnp.asarray(counts, jnp.int32)
    counts = counts[:, None] if counts.ndim == 1 else counts
    return jnp.clip(jnp.broadcast_to(counts, rows), 0, n)


def masked_topk_decode_attention(
    q, k, v, indices, valid, *, unit, new_k, new_v, lengths, first, spans, scale, layer, return_residual, softcap=None
):
    """[B, H, D], and the log-sum-exp [B, H] on request; 0 and -inf for rows that attend nothing."""
    means = None if spans is None else [take_layer(a, layer) for a in (spans.k, spans.v)]
    k, v = take_layer(k, layer), take_layer(v, layer)
    batch, heads, size, dim = k.shape
    tokens = indices[..., None] * unit + jnp.arange(unit, dtype=jnp.int32)[None, None, None]
    mask = jnp.ones(indices.shape, bool) if valid is None else valid
    mask = jnp.broadcast_to(mask[..., None], tokens.shape) & (tokens >= 0) & (tokens < size)
    if lengths is not None:
        mask = mask & (tokens < lengths[:, None, None, None])
    if first is not None:
        mask = mask & (tokens >= first[:, None, None, None])
    tokens, mask = tokens.reshape(batch, heads, -1), mask.reshape(batch, heads, -1)
    safe = jnp.where(mask, tokens, 0)[..., None]
    rows_k, rows_v = (jnp.take_along_axis(a, safe, axis=2) if size else a for a in (k, v))
    if new_k is not None:
        pairs = (rows_k, new_k[:, :, None]), (rows_v, new_v[:, :, None])
        rows_k, rows_v = (jnp.concatenate([a.astype(jnp.float32) for a in pair], axis=2) for pair in pairs)
        mask = jnp.concatenate([mask, jnp.ones((batch, heads, 1), bool)], axis=2)
    counts = jnp.ones(mask.shape, jnp.int32)
    if spans is not None:
        rows_k, rows_v = (jnp.concatenate(pair, axis=2) for pair in zip((rows_k, rows_v), means, strict=True))
        mask = jnp.concatenate([mask, spans.counts > 0], axis=2)
        counts = jnp.concatenate([counts, jnp.maximum(spans.counts, 1)], axis=2)
    grouped = q.reshape(batch, heads, -1, dim).astype(jnp.float32)
    logits = jnp.einsum("bkgd,bknd->bkgn", grouped, rows_k.astype(jnp.float32), precision="highest") * scale
    logits = soft_cap(logits, softcap) + jnp.log(counts.astype(jnp.float32))[:, :, None]
    return softmax_sum(logits, mask, rows_v, q, return_residual)


def softmax_sum(logits, mask, values, q, return_residual):
    """Softmax of logits [B, K, G, N] where mask [B, K, N] is set, times values [B, K, N, D], computed in float32."""
    mask = jnp.broadcast_to(mask[:, :, None], logits.shape)
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jnp.maximum(top, LOWEST)
    weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = jnp.where(mask[:, :, 0, :, None], values.astype(jnp.float32), 0.0)  # what is not attended may be NaN
    out = jnp.einsum("bkgn,bknd->bkgd", weights, values, precision="highest")
    out = (out / jnp.where(total == 0, 1.0, total)).reshape(q.shape).astype(q.dtype)
    residual = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    return (out, residual.reshape(q.shape[:2])) if return_residual else out
