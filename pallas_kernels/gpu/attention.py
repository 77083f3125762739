"""Attention over chosen units on GPU. Array-indexed loads gather single rows of the caches.

The chosen tokens of a row are split over programs, so that all multiprocessors are busy. A second kernel merges the
splits and the current token by their log-sum-exps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.arithmetic import product
from pallas_kernels.gpu.tiles import current_tiles
from pallas_kernels.gpu.triton import launch, padded_size, pairs, place_operands, seen_range, source_row
from pallas_kernels.reference import LOWEST

MERGED = 128  # splits of a row that are merged at a time


class SplitPlan(NamedTuple):
    """Sizes that the kernels are compiled for.

    Attributes:
        unit: Tokens of a unit.
        n: Units listed for a row.
        tokens: Tokens of a block.
        splits: Programs of a row's units.
        span_splits: Programs of its spans.
        heads: K.
        group: G.
        dim: D.
        scale: The factor on the logits.
    """

    unit: int
    n: int
    tokens: int
    splits: int
    span_splits: int
    heads: int
    group: int
    dim: int
    scale: float


def masked_topk_decode_attention(q, k, v, indices, valid, *, interpret, return_residual, **options):
    """[B, H, D], and the log-sum-exp [B, H] on request. Arguments as in `api.py`."""
    units = indices if valid is None else jnp.where(valid, indices, -1)
    out, residual = attend_to_units(q, k, v, units, None, interpret=interpret, **options)
    return (out, residual) if return_residual else out


def attend_to_units(q, k, v, units, taken, *, unit, new_k, new_v, lengths, first, scale, layer, interpret, spans=None):
    """Attention [B, H, D] over the first `taken` [B, K] of the units [B, K, N], or those >= 0; log-sum-exp [B, H]."""
    batch, heads, n = units.shape
    size, dim = k.shape[-2:]
    rows, group = batch * heads, q.shape[1] // heads
    operands = place_operands(layer, lengths, first)
    operands |= dict(units=units.reshape(rows, n), taken=None if taken is None else taken.reshape(rows))
    operands |= dict(q=q.reshape(rows, group, dim), k=k.reshape(-1, size, dim), v=v.reshape(-1, size, dim))
    tiles = current_tiles()
    tokens = tiles.attend_tokens(padded_size(dim), k.dtype.itemsize, padded_size(group))

    def programs(keys):
        return max(1, min(pl.cdiv(keys, max(tokens, tiles.least_tokens)), tiles.programs // rows))

    splits, span_splits = programs(n * unit), 0
    if spans is not None:
        count = spans.counts.shape[2]
        span_splits = programs(count)
        operands |= {f"span_{name}": a.reshape(-1, count, dim) for name, a in (("k", spans.k), ("v", spans.v))}
        operands |= dict(counts=spans.counts.reshape(rows, count))
    # With the loop over spans, wide keys in float32 need more registers than the threads have.
    wide = spans is not None and k.dtype.itemsize > 2 and padded_size(dim) >= 8 * padded_size(group)
    plan = SplitPlan(unit, n, tokens, splits, span_splits, heads, group, dim, scale)
    splits += span_splits
    stats = jax.ShapeDtypeStruct((rows, splits, group), jnp.float32)
    top, total, out = launch(
        functools.partial(_attend_kernel, plan=plan),
        operands,
        grid=(rows, splits),
        out_shape=[stats, stats, jax.ShapeDtypeStruct((rows, splits, group, dim), jnp.float32)],
        warps=tiles.attend_warps * (2 if wide else 1),
        stages=tiles.attend_stages,
        interpret=interpret,
        name="attend_to_tokens",
    )
    new_k, new_v = (None if new is None else new.reshape(rows, dim) for new in (new_k, new_v))
    out, residual = launch(
        functools.partial(_merge_kernel, plan=plan),
        dict(top=top, total=total, out=out, q=operands["q"], new_k=new_k, new_v=new_v),
        grid=(rows * group,),
        out_shape=[
            jax.ShapeDtypeStruct((rows, group, dim), q.dtype),
            jax.ShapeDtypeStruct((rows, group), jnp.float32),
        ],
        warps=4,
        interpret=interpret,
        name="merge_splits",
    )
    return out.reshape(q.shape), residual.reshape(q.shape[:2])


def _attend_kernel(refs, top_ref, total_ref, out_ref, *, plan):
    """The largest logit, the sum of weights and the weighted values of one split of a row, or of its spans."""
    unit, n, tokens, splits, span_splits, heads, group, dim, scale = plan
    row, split = pl.program_id(0), pl.program_id(1)
    rows = refs["units"].shape[0]
    begin, end = seen_range(refs, row // heads, refs["k"].shape[1])
    source = source_row(refs, row, rows)
    head, column = (jnp.arange(padded_size(s), dtype=jnp.int32) for s in (group, dim))
    of_q = pairs(head, column)
    inside_q = (of_q[0] < group) & (of_q[1] < dim)
    queries = plgpu.load(refs["q"].at[(row, *of_q)], mask=inside_q, other=0).astype(refs["k"].dtype)
    slots = refs["taken"][row] * unit if "taken" in refs else jnp.int32(n * unit)

    def share_of(keys, split, splits):
        """The first block of a split and the end of its blocks; none for numbers that are no split."""
        blocks = (keys + tokens - 1) // tokens
        share = (blocks + splits - 1) // splits  # so that few keys are split too
        return jnp.maximum(split * share, 0), jnp.minimum((split + 1) * share, blocks)

    def fold(carry, k_ref, v_ref, position, seen, counts):
        """The sums with those of some keys of the source."""
        top, total, out = carry
        of_token = pairs(jnp.where(seen, position, 0), column)
        inside = jnp.broadcast_to(seen[:, None], of_token[0].shape) & (of_token[1] < dim)
        keys = plgpu.load(k_ref.at[(source, *of_token)], mask=inside, other=0)
        values = plgpu.load(v_ref.at[(source, *of_token)], mask=inside, other=0)
        logits = product(queries, keys, (1, 1)) * np.float32(scale)
        logits = logits if counts is None else logits + jnp.log(counts.astype(jnp.float32))[None, :]
        logits = jnp.where(seen[None, :], logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - higher[:, None])
        kept = jnp.exp(top - higher)
        added = product(weights.astype(values.dtype), values)
        return higher, total * kept + jnp.sum(weights, axis=1), out * kept[:, None] + added

    def attend(i, carry):
        slot = i * tokens + jnp.arange(tokens, dtype=jnp.int32)
        listed = slot < slots
        chosen = plgpu.load(refs["units"].at[row, slot // unit], mask=listed, other=-1)
        position = chosen * unit + slot % unit
        seen = listed & (chosen >= 0) & (position >= begin) & (position < end)
        return fold(carry, refs["k"], refs["v"], position, seen, None)

    def attend_spans(i, carry):
        span = i * tokens + jnp.arange(tokens, dtype=jnp.int32)
        counts = plgpu.load(refs["counts"].at[row, span], mask=span < refs["counts"].shape[1], other=0)
        return fold(carry, refs["span_k"], refs["span_v"], span, counts > 0, counts)

    nothing, zero = (jnp.full(head.shape, value, jnp.float32) for value in (LOWEST, 0.0))
    empty = nothing, zero, jnp.zeros(of_q[0].shape, jnp.float32)
    sums = jax.lax.fori_loop(*share_of(slots, split, splits), attend, empty)
    if span_splits:
        share = share_of(refs["counts"].shape[1], split - splits, span_splits)
        sums = jax.lax.fori_loop(*share, attend_spans, sums)
    top, total, out = sums
    plgpu.store(top_ref.at[row, split, head], top, mask=head < group)
    plgpu.store(total_ref.at[row, split, head], total, mask=head < group)
    plgpu.store(out_ref.at[(row, split, *of_q)], out, mask=inside_q)


def _merge_kernel(refs, out_ref, residual_ref, *, plan):
    """Attention and log-sum-exp of one query head, from its splits and the new token."""
    row, head = pl.program_id(0) // plan.group, pl.program_id(0) % plan.group
    splits = plan.splits + plan.span_splits
    tile, column = min(padded_size(splits), MERGED), jnp.arange(padded_size(plan.dim), dtype=jnp.int32)
    inside = column < plan.dim

    def add(i, carry):
        """The sums with those of a tile of splits."""
        split = i * tile + jnp.arange(tile, dtype=jnp.int32)
        tops = plgpu.load(refs["top"].at[row, split, head], mask=split < splits, other=LOWEST)
        totals = plgpu.load(refs["total"].at[row, split, head], mask=split < splits, other=0)
        at, along = pairs(split, column)
        parts = plgpu.load(refs["out"].at[row, at, head, along], mask=(at < splits) & (along < plan.dim), other=0)
        top = jnp.maximum(carry[0], jnp.max(tops))
        before, kept = jnp.exp(carry[0] - top), jnp.exp(tops - top)
        return (
            top,
            carry[1] * before + jnp.sum(totals * kept),
            carry[2] * before + jnp.sum(parts * kept[:, None], axis=0),
        )

    sums = jnp.float32(LOWEST), jnp.float32(0), jnp.zeros(column.shape, jnp.float32)
    sums = add(0, sums) if splits <= tile else jax.lax.fori_loop(0, pl.cdiv(splits, tile), add, sums)
    top, total, out = sums
    if "new_k" in refs:
        queries, new_k, new_v = (
            plgpu.load(refs[name].at[(*index, column)], mask=inside, other=0).astype(jnp.float32)
            for name, index in (("q", (row, head)), ("new_k", (row,)), ("new_v", (row,)))
        )
        logit = jnp.sum(queries * new_k) * np.float32(plan.scale)
        higher = jnp.maximum(top, logit)
        kept, weight = jnp.exp(top - higher), jnp.exp(logit - higher)
        top, total, out = higher, total * kept + weight, out * kept + weight * new_v
    none = total == 0  # NaN is not 0, so it stays
    total = jnp.where(none, 1.0, total)
    plgpu.store(out_ref.at[row, head, column], (out / total).astype(out_ref.dtype), mask=inside)
    residual_ref[row, head] = jnp.where(none, -jnp.inf, top + jnp.log(total))
