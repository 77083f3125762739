"""The cross entropy in one pass over chunks of query rows, in XLA.

A chunk forms its rows of both weight matrices once. They give the attention output, the loss and the gradients of q_imp
and k_imp, so the backward pass only scales. Letters beside the alphabet: a tile has M rows, the C query rows of a chunk
times the query heads that share a key head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from butler_jax.model import attention, centred_squares, project_values
from butler_jax.training.losses.contested_keys import KeyRange, contested_mask, counted_rows
from butler_jax.training.losses.second_stage import chosen_keys
from butler_jax.training.losses.target import ErrorRule, ErrorTarget, offset_penalty


def run_fused(
    q,
    k,
    v,
    q_imp,
    k_imp,
    segments,
    keys: KeyRange,
    *,
    differentiate: bool,
    target: ErrorTarget | None = None,
    rule: ErrorRule | None = None,
    **terms,
):
    """((output, loss, count), gradients of q_imp, k_imp and the target's offset) of `attend_with_cross_entropy`.

    The gradients are float32, and None unless `differentiate`; that of the offset is None without a target.
    terms: softcap and sink_logits, as in `model.causal_attention`.
    """
    batch, length, heads, dim = q.shape
    key_heads = k_imp.shape[2]
    chunk = min(attention.CHUNK, length)
    scale = q_imp.shape[-1] ** -0.5
    queries = attention.split_queries(q, k.shape[2], chunk)
    scaled_q_imp = attention.split_queries(q_imp.astype(jnp.float32) * scale, key_heads, chunk)
    all_k, all_k_imp = attention.split_keys(k, chunk), attention.split_keys(k_imp.astype(jnp.float32), chunk)
    all_v = attention.split_keys(v, chunk)
    counted = counted_rows((batch, length), segments, keys)

    def tile(per_row):  # [B, T, 1 or H] for the rows of every tile
        return attention.split_queries(jnp.broadcast_to(per_row[..., None], (*q_imp.shape[:3], 1)), key_heads, chunk)

    rows_counted = tile(counted[:, :, None])
    segments = attention.split_segments(segments, chunk)
    if target is not None:
        projected, squares = project_values(all_v, target.gram)
        of_rows = tile(target.norm[:, :, None]), tile(target.offset.astype(jnp.float32))
    far = None if target is None else target.far
    if far is not None:
        far = [jnp.pad(a, ((0, 0), (0, -length % chunk))) for a in far]
    starts = jnp.zeros((1, all_k.shape[2]), jnp.int32) if segments is None else attention.document_starts(segments)

    def step(band, carry, inputs):
        loss, dk_imp = carry
        index, rows, rows_imp, use, *of_target = inputs
        first = band.first_key(index, chunk)
        seen = attention.chunk_mask(index, first, band.keys, segments, keys.sliding_window, chunk)
        own_keys = band.take(all_k, first, 2)
        true, true_total, _ = attention.masked_exponentials(rows, own_keys, seen, dim**-0.5, **terms)
        output = attention.weighted_values(true, band.take(all_v, first, 2)) / true_total

        contested = contested_mask(seen, index, first, starts, keys)
        keys_imp = band.take(all_k_imp, first, 2)
        predicted, predicted_total, predicted_lse = attention.masked_exponentials(rows_imp, keys_imp, contested, 1.0)
        if not keys.all_contested:
            true = jnp.where(_tile(contested, true.shape[2]), true, 0)
        if far is not None:
            end, log_count = (jax.lax.dynamic_slice_in_dim(a, index * chunk, chunk, axis=1)[..., None] for a in far)
            log_counts = jnp.where(first + jnp.arange(band.keys)[None, None] < end, log_count, 0.0)
            single, true = true, true * _tile(jnp.exp(log_counts), true.shape[2])
            true_total = true_total + jnp.sum(true - single, axis=-1, keepdims=True)
            predicted, predicted_total, predicted_lse = _count(predicted, predicted_total, predicted_lse, log_counts)
        true = true / true_total
        if target is not None:
            split = (batch, k.shape[2], heads // k.shape[2], chunk, -1)
            values = band.take(projected, first, 3), band.take(squares, first, 3)
            true = true.reshape(split)
            if rule.error == "centred":
                true = true * jnp.sqrt(jnp.maximum(centred_squares(output.reshape(split), *values, target.gram), 0.0))
            elif rule.error == "value":
                true = true * jnp.sqrt(values[1])[:, :, :, None]
            true = true.reshape(*output.shape[:3], -1)
        true = _regroup(true, key_heads) * use
        if target is not None:
            norm, offset = of_target
            true = true / jnp.maximum(norm, 1e-30)
        mass = jnp.sum(true, axis=-1, keepdims=True)  # the attention that goes to contested keys
        doffset = None
        if target is not None:
            penalty, doffset = offset_penalty(offset, predicted_lse, mass, use, rule)
            loss += penalty
        if keys.chosen is not None:
            scores = jnp.einsum("bqmr,bqsr->bqms", rows_imp, keys_imp)
            logs = scores + offset if target is not None else scores
            if target is None or rule.normalised:
                logs = logs - predicted_lse
            logs = jnp.where(_tile(contested, scores.shape[2]), logs, -jnp.inf)
            split = (batch, k.shape[2], heads // k.shape[2], chunk, -1)
            chosen = chosen_keys(logs.reshape(split), seen, index, first, starts, keys) & contested[:, None]
            found = attention.exponentials(scores.reshape(split), chosen[:, :, None])
            found = [a.reshape(*scores.shape[:3], -1) for a in found]
            predicted, predicted_total, predicted_lse = found if far is None else _count(*found, log_counts)
            true = jnp.where(chosen[:, :, None], true.reshape(split), 0.0).reshape(scores.shape)
            mass = jnp.sum(true, axis=-1, keepdims=True)
        if far is not None:
            loss -= jnp.sum(true * _tile(log_counts, true.shape[2]))
        mean_k_imp = attention.weighted_values(true, keys_imp)
        loss += jnp.sum(mass * predicted_lse - jnp.sum(rows_imp * mean_k_imp, axis=-1, keepdims=True))
        output = output.astype(v.dtype)
        if not differentiate:
            return (loss, dk_imp), (output, None, None)
        dscores = predicted * (mass / predicted_total) - true
        change = jnp.einsum("bqmr,bqms->bqrs", rows_imp, dscores)
        dk_imp = jax.lax.dynamic_update_slice_in_dim(dk_imp, band.take(dk_imp, first, 3) + change, first, axis=3)
        return (loss, dk_imp), (output, scale * attention.weighted_values(dscores, keys_imp), doffset)

    # The gradient of k_imp is summed as [B, Q, R, S]: the large factor of its product is then read untransposed.
    dk_imp = jnp.zeros_like(all_k_imp.transpose(0, 1, 3, 2)) if differentiate else None
    carry = (jnp.zeros((), jnp.float32), dk_imp)
    parts = []
    for band in attention.make_bands(queries.shape[0], chunk, keys.sliding_window):
        part = slice(band.start, band.stop)
        inputs = (jnp.arange(band.start, band.stop), queries[part], scaled_q_imp[part], rows_counted[part])
        if target is not None:
            inputs += tuple(a[part] for a in of_rows)
        carry, found = jax.lax.scan(functools.partial(step, band), carry, inputs)
        parts.append(found)
    loss, dk_imp = carry
    output, dq_imp, doffset = (
        None if part[0] is None else attention.merge_queries(jnp.concatenate(part), chunk, length)
        for part in zip(*parts, strict=True)
    )
    results = (output, loss, heads * jnp.sum(counted))
    if not differentiate:
        return results, None, None, None
    doffset = None if doffset is None else doffset[..., 0]
    return results, dq_imp, dk_imp.transpose(0, 3, 1, 2)[:, :length], doffset


def _count(weights, total, lse, log_counts):
    """`exponentials` of a tile with every key as often as it counts; log_counts [B, C, S]."""
    weights = weights * _tile(jnp.exp(log_counts), weights.shape[2])
    counted = jnp.sum(weights, axis=-1, keepdims=True)
    counted = jnp.where(counted == 0, 1.0, counted)
    return weights, counted, lse + jnp.log(counted / total)


def _tile(mask, rows: int):
    """A mask or numbers [B, C, S] repeated for the query heads of a tile: [B, 1, M, S] with M = `rows`."""
    batch, chunk, size = mask.shape
    tiled = jnp.broadcast_to(mask[:, None, None], (batch, 1, rows // chunk, chunk, size))
    return tiled.reshape(batch, 1, rows, size)


def _regroup(tiles, key_heads: int):
    """Tiles [B, K, M, S] of K key heads as tiles of `key_heads` ones; the query heads of a tile follow one another."""
    return tiles.reshape(tiles.shape[0], key_heads, -1, tiles.shape[3])
