"""Importance scores with XLA, fast on CPU. Arguments are those of `api.py` after its checks.

Measured on CPU: arithmetic that is fused with reading k_imp is nearly free. Temporary arrays beyond a few MB cost page
faults. A slice of a cache stacked over layers must be fused with its use, or the layer is copied.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arithmetic import exact, finite_or_zero, total_of
from pallas_kernels.reference import LOWEST, seen

TILE = 2**18  # elements of a temporary array that stays in a core's cache
KEPT = 5 * 2**19  # products that are kept, in one chunk, for their log-sum-exps and pooling; more are computed twice
COLUMNS = 256  # products are summed down this many columns first
FUSED = 2**21  # products that one fused loop pools; more are pooled by chunks, unless k_imp is int8
MOST_TERMS = 256  # products that are unrolled into one fused loop
UNROLLED = 8  # chunks that are unrolled, where XLA would convert the whole operand of a loop to float32 before it
LAYERS = 8  # layers that are scored without a loop, at most


def layer_by_layer(function):
    """Extend a function that scores rows of one layer to P of them, one after the other."""

    @functools.wraps(function)
    def extended(q_imp, k_imp, lengths, *, layer, scales, **options):
        if np.ndim(layer) == 0:
            return function(q_imp, k_imp, lengths, layer=layer, scales=scales, **options)
        layer, count = jnp.asarray(layer), np.size(layer)
        if scales is not None:
            scales = jnp.broadcast_to(scales, (q_imp.shape[0], k_imp.shape[-3]))
        rows = dict(q_imp=q_imp, lengths=lengths, scales=scales)
        rows |= {name: options.pop(name) for name in ("first", "totals", "offset") if name in options}
        rows = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 0), rows)

        def one(given):
            layer, rows = given
            return function(k_imp=k_imp, layer=layer, **rows, **options)

        if count <= LAYERS:
            found = [one(jax.tree.map(lambda a, p=p: a[p], (layer, rows))) for p in range(count)]
            found = jnp.stack(found, axis=1)
        else:
            found = jnp.moveaxis(jax.lax.map(one, (layer, rows)), 0, 1)
        return found.reshape(-1, *found.shape[2:])

    return extended


@layer_by_layer
def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, offset, scales, scale, first, layer):
    """Scores pooled over the group, float32 [B, K, S]; -inf for tokens not seen."""
    size, loops = k_imp.shape[-1], k_imp.dtype == jnp.float32
    factor, k_imp_at = _factor_and_blocks(q_imp, k_imp, scales, scale, layer)
    mask, products = seen(size, lengths, first), factor.size * size
    operands = q_imp, factor, k_imp_at, mask, loops
    if normalised and totals is None and products <= KEPT:
        kept, *sums = _map_chunks(lambda *found: found, KEPT, *operands)
        scores = _join(_pool(kept, _less(finite_or_zero(_total(*sums)), offset)[None]), size)
        return jnp.where(mask[:, None], scores, -jnp.inf)
    if normalised and totals is None:
        totals = _log_sum_exp(*operands)
    totals = None if totals is None else _less(finite_or_zero(totals), offset)
    if products > FUSED and k_imp.dtype != jnp.int8:
        scores = _join(_map_chunks(lambda found, *_: _pool(found, totals), TILE, *operands), size)
    else:
        scores = _pooled(q_imp.astype(jnp.float32) * factor[..., None], k_imp_at(0, size), totals)
    return jnp.where(mask[:, None], scores, -jnp.inf)


@layer_by_layer
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
        corner = [jnp.asarray(i, jnp.int32) for i in (*start, at)]  # one type under jax_enable_x64 too
        found = jax.lax.dynamic_slice(stacked, corner, (1, *k_imp.shape[-4:-1], width))
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
    if q_imp.shape[2] * q_imp.shape[3] > MOST_TERMS:
        scores = _products(q_imp, k_imp)
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        return _pool(scores, total)
    best = None
    for member, score in enumerate(_members(q_imp, k_imp)):  # k_imp is read once and only the result is written
        score = jnp.where(jnp.isnan(score), -jnp.inf, score)
        if total is not None:
            score = score - total[:, :, member, None]
        best = score if best is None else jnp.maximum(best, score)
    return best


def _members(q_imp, k_imp):
    """The products of every query head of the group, float32 [B, K, width] each, as one loop over the tokens."""
    for member in range(q_imp.shape[2]):
        own = k_imp[:, :, member if k_imp.shape[2] > 1 else 0]
        terms = [q_imp[:, :, member, r, None] * own[:, :, r].astype(jnp.float32) for r in range(q_imp.shape[3])]
        yield sum(terms[1:], terms[0])


def _log_sum_exp(*operands):
    """Log-sum-exps over the tokens where the mask is set, float32 [B, K, G]. operands: those of `_map_chunks`."""
    return _total(*_map_chunks(lambda _, *sums: sums, TILE, *operands))


def _less(total, offset):
    """What is taken off the scores: the log-sum-exps, less the offset where there is one."""
    return total if offset is None else total - offset


def _pool(scores, total):
    """The maximum of [..., G, width] over the group, less total [..., G] where given.

    It is taken head after head: XLA's reduction of an axis that is not the last is slow on CPU.
    """
    return functools.reduce(jnp.maximum, jnp.unstack(scores if total is None else scores - total[..., None], axis=-2))


def _join(pooled, size):
    """[B, K, S] of chunks [chunks, B, K, chunk], of which the last overlaps the one before it."""
    chunks, batch, heads, chunk = pooled.shape
    before = jnp.moveaxis(pooled[:-1], 0, 2).reshape(batch, heads, (chunks - 1) * chunk)
    return jnp.concatenate([before, pooled[-1, ..., chunks * chunk - size :]], axis=-1)


def _map_chunks(take, tile, q_imp, factor, k_imp_at, mask, loops):
    """What `take` gives for each chunk of S, stacked. The chunks are looped or unrolled.

    The last chunk overlaps the one before it. A product that the one before has counted does not count again.

    Args:
        take: A function of the products of a chunk [B, K, G, chunk], and of their maximum and the sum of their
            exponentials where mask [B, S] is set, [B, K, G] each.
        tile: About how many products a chunk has.
    """
    size = mask.shape[-1]
    chunks = -(-factor.size * size // tile)
    chunk = -(-size // (chunks if loops else min(chunks, UNROLLED)))
    chunk = min(size, -(-chunk // COLUMNS) * COLUMNS)
    columns = COLUMNS if chunk % COLUMNS == 0 else chunk

    def products(k_imp):
        if k_imp.dtype == jnp.int8 and q_imp.shape[2] * q_imp.shape[3] <= MOST_TERMS:
            members = _members(q_imp.astype(jnp.float32) * factor[..., None], k_imp)
            return jnp.stack(jax.lax.optimization_barrier(tuple(members)), axis=2)  # else they are computed thrice
        return _products(q_imp, k_imp) * factor[..., None]

    def part(index):
        at = jnp.minimum(index * chunk, size - chunk)
        new = at + jnp.arange(chunk, dtype=jnp.int32) >= index * chunk
        seen_here = jax.lax.dynamic_slice_in_dim(mask, at, chunk, axis=1)
        scores = products(k_imp_at(at, chunk))
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        counted = jnp.where((seen_here & new[None])[:, None, None], scores, -jnp.inf)
        counted = counted.reshape(*scores.shape[:-1], -1, columns)  # XLA sums rows of vectors fast, and numbers slowly
        top = jnp.maximum(jnp.max(jnp.max(counted, axis=-2), axis=-1), LOWEST)
        return take(scores, top, jnp.sum(jnp.sum(jnp.exp(counted - top[..., None, None]), axis=-2), axis=-1))

    chunks = -(-size // chunk)
    if loops:
        return jax.lax.map(part, jnp.arange(chunks, dtype=jnp.int32))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *map(part, range(chunks)))


def _total(tops, sums):
    """The log-sum-exp of all chunks from the maximum and the sum of each, [chunks, B, K, G]."""
    top = jnp.max(tops, axis=0)
    return total_of(top, jnp.sum(sums * jnp.exp(tops - top[None]), axis=0))
