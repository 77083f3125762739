"""Importance scores with XLA, fast on CPU. Arguments are those of `api.py` after its checks.

Measured on CPU: arithmetic that is fused with reading k_imp is nearly free. Temporary arrays beyond a few MB cost page
faults. A slice of a cache stacked over layers must be fused with its use, or the layer is copied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import exact, finite_or_zero, total_of
from pallas_kernels.reference import LOWEST, seen

TILE = 2**18  # elements of a temporary array that stays in a core's cache
MOST_TERMS = 256  # products that are unrolled into one fused loop
UNROLLED = 8  # chunks that are unrolled, where XLA would convert the whole operand of a loop to float32 before it


def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, scales, scale, first, layer):
    """Scores pooled over the group, float32 [B, K, S]; -inf for tokens not seen."""
    size = k_imp.shape[-1]
    if normalised and totals is None:
        totals = importance_totals(q_imp, k_imp, lengths, scales=scales, scale=scale, first=first, layer=layer)
    totals = None if totals is None else finite_or_zero(totals)
    factor, k_imp_at = _factor_and_blocks(q_imp, k_imp, scales, scale, layer)
    scores = _pooled(q_imp.astype(jnp.float32) * factor[..., None], k_imp_at(0, size), totals)
    return jnp.where(seen(size, lengths, first)[:, None], scores, -jnp.inf)


def importance_totals(q_imp, k_imp, lengths, *, scales, scale, first, layer):
    """Log-sum-exps, float32 [B, K, G]; -inf where a row sees nothing."""
    factor, k_imp_at = _factor_and_blocks(q_imp, k_imp, scales, scale, layer)
    mask = seen(k_imp.shape[-1], lengths, first)
    return _log_sum_exp(q_imp, factor, k_imp_at, mask, k_imp.dtype == jnp.float32)


def _factor_and_blocks(q_imp, k_imp, scales, scale, layer):
    """The factor on the products, float32 [B, K, G], and k_imp_at(at, width), which gives [B, K, 1 or G, R, width]."""
    batch, heads, group, rank = q_imp.shape
    factor = jnp.full((batch, heads, group), scale, jnp.float32)
    shared = k_imp.shape[-3] == heads
    if scales is not None:
        scales = jnp.broadcast_to(scales, (batch, k_imp.shape[-3])).astype(jnp.float32)
        factor = factor * scales.reshape(batch, heads, -1)
    stacked = k_imp if layer is not None else k_imp[None]
    start = (0 if layer is None else layer, 0, 0, 0)

    def k_imp_at(at, width):
        found = jax.lax.dynamic_slice(stacked, (*start, at), (1, *k_imp.shape[-4:-1], width))
        return found.reshape(batch, heads, 1 if shared else group, rank, width)

    return factor, k_imp_at


def _products(q_imp, k_imp):
    """Products, float32 [B, K, G, width], of q_imp [B, K, G, R] and k_imp [B, K, 1 or G, R, width]."""
    if q_imp.dtype != k_imp.dtype:
        q_imp, k_imp = q_imp.astype(jnp.float32), k_imp.astype(jnp.float32)
    form, k_imp = ("bkgr,bkrs->bkgs", k_imp[:, :, 0]) if k_imp.shape[2] == 1 else ("bkgr,bkgrs->bkgs", k_imp)
    return jnp.einsum(form, q_imp, k_imp, preferred_element_type=jnp.float32, precision=exact(k_imp.dtype))


def _pooled(q_imp, k_imp, total):
    """The maximum over the group of products, less total [B, K, G] where given, float32 [B, K, S]."""
    group, rank = q_imp.shape[2:]
    if group * rank > MOST_TERMS:
        scores = _products(q_imp, k_imp)
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        return jnp.max(scores if total is None else scores - total[..., None], axis=2)
    best = None
    for member in range(group):  # unrolled, so that k_imp is read once and only the result is written
        own = k_imp[:, :, member if k_imp.shape[2] > 1 else 0]
        terms = [q_imp[:, :, member, r, None] * own[:, :, r].astype(jnp.float32) for r in range(rank)]
        score = sum(terms[1:], terms[0])
        score = jnp.where(jnp.isnan(score), -jnp.inf, score)
        if total is not None:
            score = score - total[:, :, member, None]
        best = score if best is None else jnp.maximum(best, score)
    return best


def _log_sum_exp(q_imp, factor, k_imp_at, mask, loops):
    """Log-sum-exps over the tokens where mask [B, S] is set, float32 [B, K, G], by chunks of S, looped or unrolled."""
    batch, heads, group, _ = q_imp.shape
    size = mask.shape[-1]
    chunk = min(size, max(256, TILE // (batch * heads * group)))
    if not loops:
        chunk = max(chunk, -(-size // UNROLLED))

    def part(index):
        at = jnp.minimum(index * chunk, size - chunk)  # the last chunk overlaps the one before it
        columns = at + jnp.arange(chunk, dtype=jnp.int32)
        own = jax.lax.dynamic_slice_in_dim(mask, at, chunk, axis=1) & (columns >= index * chunk)[None]
        scores = _products(q_imp, k_imp_at(at, chunk)) * factor[..., None]
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
