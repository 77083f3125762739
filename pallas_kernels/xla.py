"""The same functions for any platform that XLA compiles for, fast on CPU: nothing is sorted, only chosen rows are read.

The n-th best score is found by bisection on the order-preserving unsigned image of float32; the chosen positions
are compacted by ranks. Arguments are those of `api.py` after its checks.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.reference import per_head, seen, softmax_sum, take_layer, wanted

TOP = np.uint32(0xFFFFFFFF)  # forced units take the images from here down, above that of +inf, 0xFF800000
BARRED = np.uint32(0)  # below the image of -inf


def importance_scores(q_imp, score_keys, lengths, *, pooling, scales, scale, first, layer):
    """float32 [B, K, S]; -inf where a row sees nothing."""
    batch, heads, group, rank = q_imp.shape
    keys = take_layer(score_keys, layer)
    size = keys.shape[-1]
    if keys.dtype == jnp.int8:
        keys = per_head(keys, scales)
    q = (q_imp * jnp.asarray(scale, q_imp.dtype)).astype(keys.dtype)
    q = q.reshape(batch, keys.shape[1], -1, rank)
    scores = jnp.einsum("bqgr,bqrs->bqgs", q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, group, size)
    mask = jnp.broadcast_to(seen(size, lengths, first)[:, None], (batch, heads, size))
    if pooling == "normalised" and group > 1:
        shown = jnp.where(mask[:, :, None], scores, -jnp.inf)
        top = jnp.max(shown, axis=-1, keepdims=True, initial=-1e30)
        total = jnp.sum(jnp.exp(shown - top), axis=-1, keepdims=True)
        scores = scores - (top + jnp.log(total))
    return jnp.where(mask, jnp.max(scores, axis=2), -jnp.inf)


def ordered_image(scores):
    """uint32 that sorts as float32 does; -0 is 0, and NaN the lowest."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def token_image(scores, lengths, *, sinks, window, first, threshold):
    """uint32 [B, K, S] that sorts as the choice does: BARRED, then by score, then sinks, then the window."""
    batch, heads, size = scores.shape
    image = ordered_image(scores)
    if threshold is not None:
        limit = jnp.broadcast_to(threshold, (batch, heads)).astype(jnp.float32)[..., None]
        image = jnp.where(scores >= limit, image, BARRED)
    positions = jnp.arange(size, dtype=jnp.int32)[None]
    age = lengths[:, None] - 1 - positions
    rank = jnp.where(age < window, age, window + positions)
    forced = (age < window) | (positions < sinks)
    image = jnp.where(forced[:, None], TOP - rank.astype(jnp.uint32)[:, None], image)
    return jnp.where(seen(size, lengths, first)[:, None], image, BARRED)


def select_top_k(scores, lengths, n, *, counts, sinks, window, unit, first, threshold):
    """(indices, valid) [B, K, n]."""
    image = token_image(scores, lengths, sinks=sinks, window=window, first=first, threshold=threshold)
    if unit > 1:
        padded = jnp.pad(image, ((0, 0), (0, 0), (0, -image.shape[-1] % unit)))
        image = jnp.max(padded.reshape(*image.shape[:2], -1, unit), axis=-1)
    batch, heads, units = image.shape
    if n == 0 or units == 0:
        return jnp.zeros((batch, heads, n), jnp.int32), jnp.zeros((batch, heads, n), bool)
    taken = jnp.minimum(jnp.sum(image != BARRED, axis=-1, dtype=jnp.int32), wanted(counts, n, (batch, heads)))
    mask = top_mask(image, taken)
    slot = jnp.arange(n, dtype=jnp.int32)[None, None]
    place = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
    rows = jnp.arange(batch * heads, dtype=jnp.int32)[:, None]
    place = jnp.where(mask, place, n).reshape(batch * heads, units)
    position = jnp.broadcast_to(jnp.arange(units, dtype=jnp.int32)[None], place.shape)
    indices = jnp.zeros((batch * heads, n), jnp.int32).at[rows, place].set(position, mode="drop", unique_indices=True)
    return indices.reshape(batch, heads, n), slot < taken[..., None]


def top_mask(image, count):
    """bool: the `count` [B, K] largest entries of image [B, K, S], ties to the earlier."""

    def size(mask):
        return jnp.sum(mask, axis=-1, dtype=jnp.int32)

    def narrow(step, found):
        trial = found | jnp.uint32(1) << (31 - step).astype(jnp.uint32)
        return jnp.where(size(image >= trial[..., None]) >= count, trial, found)

    limit = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(count.shape, jnp.uint32))[..., None]
    above, equal = image > limit, image == limit
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= (count - size(above))[..., None]))


def masked_topk_decode_attention(
    q, k, v, indices, valid, *, unit, new_k, new_v, lengths, first, scale, layer, return_residual
):
    """[B, H, D], and the log-sum-exp [B, H] on request; 0 and -inf for rows that attend nothing."""
    *_, batch, heads, size, dim = k.shape
    n = indices.shape[-1]
    tokens = indices[..., None] * unit + jnp.arange(unit, dtype=jnp.int32)[None, None, None]
    mask = jnp.ones(indices.shape, bool) if valid is None else valid
    mask = jnp.broadcast_to(mask[..., None], tokens.shape) & (tokens < size)
    if lengths is not None:
        mask = mask & (tokens < lengths[:, None, None, None])
    if first is not None:
        mask = mask & (tokens >= first[:, None, None, None])
    tokens, mask = (a.reshape(batch, heads, n * unit) for a in (tokens, mask))
    row = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1) * size
    start = 0 if layer is None else jnp.asarray(layer, jnp.int32) * (batch * heads * size)
    flat = jnp.where(mask, tokens, 0) + row + start
    flat_k, flat_v = (a.reshape(math.prod(a.shape[:-1]), dim) for a in (k, v))
    rows_k, rows_v = (a.at[flat].get(mode="promise_in_bounds") for a in (flat_k, flat_v))
    if new_k is not None:
        rows_k = jnp.concatenate([rows_k, new_k[:, :, None].astype(k.dtype)], axis=2)
        rows_v = jnp.concatenate([rows_v, new_v[:, :, None].astype(v.dtype)], axis=2)
        mask = jnp.concatenate([mask, jnp.ones((batch, heads, 1), bool)], axis=2)
    grouped = q.reshape(batch, heads, -1, dim)
    logits = jnp.einsum("bkgd,bknd->bkgn", grouped, rows_k, preferred_element_type=jnp.float32) * scale
    return softmax_sum(logits, mask, rows_v, q, return_residual)
