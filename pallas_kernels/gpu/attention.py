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
from pallas_kernels.gpu.triton import launch, padded_size, place_operands, seen_range
from pallas_kernels.reference import LOWEST


class SplitPlan(NamedTuple):
    """Sizes that the kernels are compiled for.

    Attributes:
        unit: Tokens of a unit.
        n: Units listed for a row.
        tokens: Tokens of a block.
        share: Blocks for each program.
        heads: K.
        group: G.
        dim: D.
        scale: The factor on the logits.
    """

    unit: int
    n: int
    tokens: int
    share: int
    heads: int
    group: int
    dim: int
    scale: float


def masked_topk_decode_attention(
    q, k, v, indices, valid, *, unit, new_k, new_v, lengths, first, scale, layer, return_residual, interpret
):
    """[B, H, D], and the log-sum-exp [B, H] on request. Arguments as in `api.py`."""
    batch, heads, n = indices.shape
    size, dim = k.shape[-2:]
    rows, group = batch * heads, q.shape[1] // heads
    units = (indices if valid is None else jnp.where(valid, indices, -1)).reshape(rows, n)
    queries = q.reshape(rows, group, dim)
    k, v = (a.reshape(-1, size, dim) for a in (k, v))
    tiles = current_tiles()
    tokens = tiles.attend_tokens(padded_size(dim), k.dtype.itemsize)
    splits = max(1, min(pl.cdiv(n * unit, max(tokens, tiles.least_tokens)), tiles.programs // rows))
    plan = SplitPlan(unit, n, tokens, pl.cdiv(n * unit, tokens * splits), heads, group, dim, scale)
    stats = jax.ShapeDtypeStruct((rows, splits, group), jnp.float32)
    parts = launch(
        functools.partial(_attend_kernel, plan=plan),
        (*place_operands(layer, lengths, first, batch, size), units, queries, k, v),
        grid=(rows, splits),
        out_shape=[stats, stats, jax.ShapeDtypeStruct((rows, splits, group, dim), jnp.float32)],
        warps=tiles.attend_warps,
        stages=tiles.attend_stages,
        interpret=interpret,
        name="attend_to_tokens",
    )
    new = () if new_k is None else (new_k.reshape(rows, dim), new_v.reshape(rows, dim))
    out, residual = launch(
        functools.partial(_merge_kernel, plan=plan),
        (*parts, queries, *new),
        grid=(rows * group,),
        out_shape=[
            jax.ShapeDtypeStruct((rows, group, dim), q.dtype),
            jax.ShapeDtypeStruct((rows, group), jnp.float32),
        ],
        warps=4,
        interpret=interpret,
        name="merge_splits",
    )
    out = out.reshape(q.shape)
    return (out, residual.reshape(q.shape[:2])) if return_residual else out


def _attend_kernel(
    layer_ref, lengths_ref, first_ref, units_ref, q_ref, k_ref, v_ref, top_ref, total_ref, out_ref, *, plan
):
    """The largest logit, the sum of weights and the weighted values of one split of a row."""
    unit, n, tokens, share, heads, group, dim, scale = plan
    row, split = pl.program_id(0), pl.program_id(1)
    rows, size = units_ref.shape[0], k_ref.shape[1]
    begin, end = seen_range(lengths_ref, first_ref, row // heads, size)
    source = layer_ref[0] * rows + row
    head, column = (jnp.arange(padded_size(s), dtype=jnp.int32) for s in (group, dim))
    of_q = _grid(head, column)
    inside_q = (of_q[0] < group) & (of_q[1] < dim)
    queries = plgpu.load(q_ref.at[(row, *of_q)], mask=inside_q, other=0).astype(k_ref.dtype)

    def attend(i, carry):
        top, total, out = carry
        slot = (split * share + i) * tokens + jnp.arange(tokens, dtype=jnp.int32)
        listed = slot < n * unit
        chosen = plgpu.load(units_ref.at[row, slot // unit], mask=listed, other=-1)
        position = chosen * unit + slot % unit
        seen = listed & (chosen >= 0) & (position >= begin) & (position < end)
        of_token = _grid(jnp.where(seen, position, 0), column)
        inside = jnp.broadcast_to(seen[:, None], of_token[0].shape) & (of_token[1] < dim)
        keys = plgpu.load(k_ref.at[(source, *of_token)], mask=inside, other=0)
        values = plgpu.load(v_ref.at[(source, *of_token)], mask=inside, other=0)
        logits = product(queries, keys, (1, 1))
        logits = jnp.where(seen[None, :], logits * np.float32(scale), -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - higher[:, None])
        kept = jnp.exp(top - higher)
        added = product(weights.astype(values.dtype), values)
        return higher, total * kept + jnp.sum(weights, axis=1), out * kept[:, None] + added

    nothing, zero = (jnp.full(head.shape, value, jnp.float32) for value in (LOWEST, 0.0))
    empty = nothing, zero, jnp.zeros(of_q[0].shape, jnp.float32)
    top, total, out = jax.lax.fori_loop(0, share, attend, empty)
    plgpu.store(top_ref.at[row, split, head], top, mask=head < group)
    plgpu.store(total_ref.at[row, split, head], total, mask=head < group)
    plgpu.store(out_ref.at[(row, split, *of_q)], out, mask=inside_q)


def _merge_kernel(top_ref, total_ref, parts_ref, q_ref, *refs, plan):
    """Attention and log-sum-exp of one query head, from its splits and the new token."""
    *new, out_ref, residual_ref = refs
    row, head = pl.program_id(0) // plan.group, pl.program_id(0) % plan.group
    splits = top_ref.shape[1]
    split, column = (jnp.arange(padded_size(s), dtype=jnp.int32) for s in (splits, plan.dim))
    inside = column < plan.dim
    tops = plgpu.load(top_ref.at[row, split, head], mask=split < splits, other=LOWEST)
    totals = plgpu.load(total_ref.at[row, split, head], mask=split < splits, other=0)
    at, along = _grid(split, column)
    parts = plgpu.load(parts_ref.at[row, at, head, along], mask=(at < splits) & (along < plan.dim), other=0)
    top = jnp.max(tops)
    if new:
        queries, new_k, new_v = (
            plgpu.load(ref.at[(*index, column)], mask=inside, other=0).astype(jnp.float32)
            for ref, index in ((q_ref, (row, head)), (new[0], (row,)), (new[1], (row,)))
        )
        logit = jnp.sum(queries * new_k) * np.float32(plan.scale)
        top = jnp.maximum(top, logit)
    kept = jnp.exp(tops - top)
    total = jnp.sum(totals * kept)
    out = jnp.sum(parts * kept[:, None], axis=0)
    if new:
        weight = jnp.exp(logit - top)
        total, out = total + weight, out + weight * new_v
    none = total == 0  # NaN is not 0, so it stays
    total = jnp.where(none, 1.0, total)
    plgpu.store(out_ref.at[row, head, column], (out / total).astype(out_ref.dtype), mask=inside)
    residual_ref[row, head] = jnp.where(none, -jnp.inf, top + jnp.log(total))


def _grid(first, second):
    """Indices of every pair of two vectors, as two matrices."""
    shape = (first.shape[0], second.shape[0])
    return jnp.broadcast_to(first[:, None], shape), jnp.broadcast_to(second[None, :], shape)
