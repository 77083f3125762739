"""The same functions for any platform that XLA compiles for, fast on CPU. Arguments are those of `api.py`, checked.

What was measured on CPU shaped them: XLA's gather of rows runs three times faster when arithmetic is fused with it,
temporary arrays beyond a few MB cost page faults, and a slice of a cache stacked over layers must never stand alone
or the layer is copied.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.reference import LOWEST, seen
from pallas_kernels.xla_select import select_top_k

__all__ = ["importance_scores", "importance_totals", "masked_topk_decode_attention", "select_top_k"]

TILE = 2**18  # elements of a temporary array that stays in a core's cache
MOST_TERMS = 256  # products that are written out in one fused loop
UNROLLED = 8  # chunks written out where a loop would have its whole operand widened to float32 beforehand


def importance_scores(q_imp, k_imp, lengths, *, pooling, totals, scales, scale, first, layer):
    """float32 [B, K, S]; -inf where a row sees nothing."""
    group, size = q_imp.shape[2], k_imp.shape[-1]
    if pooling != "normalised" or group == 1:
        totals = None
    elif totals is None and size:
        totals = importance_totals(q_imp, k_imp, lengths, scales=scales, scale=scale, first=first, layer=layer)
    totals = None if totals is None else taken_off(totals)
    factor, keys = _factor_and_keys(q_imp, k_imp, scales, scale, layer)
    scores = pooled(q_imp.astype(jnp.float32) * factor[..., None], keys(0, size), totals)
    return jnp.where(seen(size, lengths, first)[:, None], scores, -jnp.inf)


def importance_totals(q_imp, k_imp, lengths, *, scales, scale, first, layer):
    """float32 [B, K, G]; -inf where a row sees nothing."""
    if k_imp.shape[-1] == 0:
        return jnp.full(q_imp.shape[:3], -jnp.inf)
    factor, keys = _factor_and_keys(q_imp, k_imp, scales, scale, layer)
    mask = seen(k_imp.shape[-1], lengths, first)
    return log_sum_exp(q_imp, factor, keys, mask, k_imp.dtype == jnp.float32)


def _factor_and_keys(q_imp, k_imp, scales, scale, layer):
    """What products are multiplied with, float32 [B, K, G], and keys(at, width): [B, K, 1 or G, R, width]."""
    batch, heads, group, rank = q_imp.shape
    factor = jnp.full((batch, heads, group), scale, jnp.float32)
    shared = k_imp.shape[-3] == heads
    if scales is not None:
        scales = jnp.broadcast_to(scales, (batch, k_imp.shape[-3])).astype(jnp.float32)
        factor = factor * scales.reshape(batch, heads, -1)
    stacked = k_imp if layer is not None else k_imp[None]
    start = (0 if layer is None else layer, 0, 0, 0)

    def keys(at, width):
        found = jax.lax.dynamic_slice(stacked, (*start, at), (1, *k_imp.shape[-4:-1], width))
        return found.reshape(batch, heads, 1 if shared else group, rank, width)

    return factor, keys


def products(queries, keys):
    """float32 [B, K, G, width] of queries [B, K, G, R] and keys [B, K, 1 or G, R, width]."""
    if queries.dtype != keys.dtype:
        queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
    form, keys = ("bkgr,bkrs->bkgs", keys[:, :, 0]) if keys.shape[2] == 1 else ("bkgr,bkgrs->bkgs", keys)
    return jnp.einsum(form, queries, keys, preferred_element_type=jnp.float32, precision=exact(keys.dtype))


def exact(dtype):
    """The precision of a product that multiplies float32 as float32 on every platform."""
    return "highest" if dtype == jnp.float32 else None


def pooled(queries, keys, total):
    """float32 [B, K, S]: the maximum over the group of products, less total [B, K, G] where given."""
    group, rank = queries.shape[2:]
    if group * rank > MOST_TERMS:
        scores = products(queries, keys)
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        return jnp.max(scores if total is None else scores - total[..., None], axis=2)
    best = None
    for member in range(group):  # written out, so that keys are read once and nothing but the result is written
        own = keys[:, :, member if keys.shape[2] > 1 else 0]
        terms = [queries[:, :, member, r, None] * own[:, :, r].astype(jnp.float32) for r in range(rank)]
        score = sum(terms[1:], terms[0])
        score = jnp.where(jnp.isnan(score), -jnp.inf, score)
        if total is not None:
            score = score - total[:, :, member, None]
        best = score if best is None else jnp.maximum(best, score)
    return best


def log_sum_exp(queries, factor, keys, mask, loops):
    """float32 [B, K, G] over the tokens where mask [B, S] is set; chunks of S, looped over or written out."""
    batch, heads, group, _ = queries.shape
    size = mask.shape[-1]
    chunk = min(size, max(256, TILE // (batch * heads * group)))
    if not loops:
        chunk = max(chunk, -(-size // UNROLLED))

    def part(index):
        at = jnp.minimum(index * chunk, size - chunk)  # the last chunk overlaps the one before it
        columns = at + jnp.arange(chunk, dtype=jnp.int32)
        own = jax.lax.dynamic_slice_in_dim(mask, at, chunk, axis=1) & (columns >= index * chunk)[None]
        scores = products(queries, keys(at, chunk)) * factor[..., None]
        scores = jnp.where(own[:, None, None] & ~jnp.isnan(scores), scores, -jnp.inf)
        top = jnp.maximum(jnp.max(scores, axis=-1), LOWEST)
        return top, jnp.sum(jnp.exp(scores - top[..., None]), axis=-1)

    chunks = -(-size // chunk)
    if loops:
        tops, sums = jax.lax.map(part, jnp.arange(chunks, dtype=jnp.int32))
    else:
        tops, sums = (jnp.stack(parts) for parts in zip(*map(part, range(chunks)), strict=True))
    top = jnp.max(tops, axis=0)
    total = jnp.sum(sums * jnp.exp(tops - top[None]), axis=0)
    return total_of(top, total)


def total_of(top, total):
    """The log-sum-exp of a running sum: total of exp(score - top); -inf of nothing, +inf with a score of +inf."""
    found = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return jnp.where(top < jnp.inf, found, jnp.inf)


def taken_off(totals):
    """What "normalised" takes off: the log-sum-exp, or 0 where it is infinite."""
    return jnp.where(jnp.isfinite(totals), totals, 0.0)


def masked_topk_decode_attention(
    q, k, v, indices, valid, *, unit, new_k, new_v, lengths, first, scale, layer, return_residual
):
    """[B, H, D], and the log-sum-exp [B, H] on request; 0 and -inf for rows that attend nothing."""
    queries = q.reshape(k.shape[-4] * k.shape[-3], -1, q.shape[-1]).astype(jnp.float32)
    parts = attend_rows(queries, k, v, indices, valid, unit, lengths, first, scale, layer)
    return finish(parts, q, new_k, new_v, scale, return_residual)


def finish(parts, q, new_k, new_v, scale, return_residual):
    """The result of q [B, H, D], from (largest logit, sum of weights, weighted values) of its rows and the new token.

    parts: float32 [B*K, G], [B*K, G] and [B*K, G, D]; weights are exp(logit - largest logit).
    """
    top, total, out = parts
    rows, _, dim = out.shape
    if new_k is not None:
        queries = q.reshape(out.shape).astype(jnp.float32)
        logit = jnp.sum(queries * new_k.reshape(rows, 1, dim).astype(jnp.float32), axis=-1) * scale
        higher = jnp.maximum(top, logit)
        kept, weight = jnp.exp(top - higher), jnp.exp(logit - higher)
        top, total = higher, total * kept + weight
        out = out * kept[..., None] + weight[..., None] * new_v.reshape(rows, 1, dim).astype(jnp.float32)
    none = total == 0  # a sum that is NaN is handed on
    total = jnp.where(none, 1.0, total)
    out = (out / total[..., None]).reshape(q.shape).astype(q.dtype)
    residual = jnp.where(none, -jnp.inf, top + jnp.log(total))
    return (out, residual.reshape(q.shape[:2])) if return_residual else out


def attend_rows(queries, k, v, indices, valid, unit, lengths, first, scale, layer):
    """Unnormalised attention of queries [B*K, G, D]: (largest logit [B*K, G], sum of weights, weighted values)."""
    rows, group, dim = queries.shape
    n = indices.shape[-1]
    size = k.shape[-2]
    if n == 0 or size == 0:
        empty = jnp.full((rows, group), LOWEST)
        return empty, jnp.zeros((rows, group)), jnp.zeros((rows, group, dim))
    tokens, mask = chosen_tokens(indices, valid, unit, lengths, first, size)
    paged = unit if size % unit == 0 else 1  # whole pages lie together
    picked = indices.reshape(rows, n) if paged == unit else tokens.reshape(rows, -1)
    inside = mask.reshape(rows, -1, paged)
    offset = jnp.arange(rows, dtype=jnp.uint32)[:, None] * np.uint32(size // paged)
    if layer is not None:
        offset = offset + jnp.asarray(layer).astype(jnp.uint32) * np.uint32(rows * (size // paged))
    flat = jnp.where(jnp.any(inside, axis=-1), picked, 0).astype(jnp.uint32) + offset
    cache_k, cache_v = (a.reshape(math.prod(a.shape[:-2]) * (size // paged), paged * dim) for a in (k, v))

    def attend(part):
        q, at, seen_here = part
        parts, width = at.shape
        row_k = taken(cache_k, at) * np.float32(scale)
        keep = jnp.repeat(seen_here, dim, axis=-1) if paged > 1 else seen_here
        row_v = -jnp.where(keep, taken(cache_v, at), 0.0)  # what is not attended may be NaN
        row_k, row_v = (a.reshape(parts, width * paged, dim) for a in (row_k, row_v))
        logits = jnp.einsum("pgd,pnd->pgn", q, row_k, precision="highest")
        logits = jnp.where(seen_here.reshape(parts, 1, width * paged), logits, -jnp.inf)
        top = jnp.maximum(jnp.max(logits, axis=-1), LOWEST)
        weights = jnp.exp(logits - top[..., None])
        return top, jnp.sum(weights, axis=-1), -jnp.einsum("pgn,pnd->pgd", weights, row_v, precision="highest")

    most = max(1, TILE // (tokens.shape[-1] * dim)) if k.dtype == jnp.float32 else rows  # as UNROLLED
    return in_groups(attend, (queries, flat, inside), most)


def chosen_tokens(indices, valid, unit, lengths, first, size):
    """(positions, mask) [B, K, n*unit]: the tokens of the chosen units and which of them are attended."""
    batch, heads, n = indices.shape
    tokens = indices[..., None] * unit + jnp.arange(unit, dtype=jnp.int32)[None, None, None]
    mask = (tokens >= 0) & (tokens < size)
    if valid is not None:
        mask = mask & valid[..., None]
    if lengths is not None:
        mask = mask & (tokens < lengths[:, None, None, None])
    if first is not None:
        mask = mask & (tokens >= first[:, None, None, None])
    return tokens.reshape(batch, heads, n * unit), mask.reshape(batch, heads, n * unit)


def taken(cache, rows):
    """float32 [..., width]: rows of a cache."""
    return cache.at[rows].get(mode="promise_in_bounds").astype(jnp.float32)


def in_groups(function, arrays, size):
    """function of arrays [rows, ...], at most `size` rows at a time (the nearest divisor of rows)."""
    rows = arrays[0].shape[0]
    size = max(d for d in range(1, min(size, rows) + 1) if rows % d == 0)
    if size == rows:
        return function(arrays)
    out = jax.lax.map(function, tuple(a.reshape(rows // size, size, *a.shape[1:]) for a in arrays))
    return tuple(a.reshape(rows, *a.shape[2:]) for a in out)
