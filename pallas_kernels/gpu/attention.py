"""Attention over chosen units on GPU. Array-indexed loads gather single rows of the caches.

The chosen tokens of a row are split over programs, so that all multiprocessors are busy. The results of the splits and
the current token are merged by their log-sum-exps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.arithmetic import finish, product
from pallas_kernels.gpu.triton import launch, padded_size
from pallas_kernels.operands import attention_operands
from pallas_kernels.reference import LOWEST

PROGRAMS = 528  # the number to aim at: four for each of 132 multiprocessors
TOKENS = 64  # attended at a time


class SplitPlan(NamedTuple):
    """Sizes that the kernel is compiled for.

    Attributes:
        unit: Tokens of a unit.
        n: Units listed for a row.
        share: Blocks of tokens for each program.
        dim: D.
        heads: K.
        scale: The factor on the logits.
    """

    unit: int
    n: int
    share: int
    dim: int
    heads: int
    scale: float


def masked_topk_decode_attention(
    q, k, v, indices, valid, *, unit, new_k, new_v, lengths, first, scale, layer, return_residual, interpret
):
    """[B, H, D], and the log-sum-exp [B, H] on request. Arguments as in `api.py`."""
    heads, n = indices.shape[1:]
    base, units, bounds, queries, k, v = attention_operands(
        q, k, v, indices, valid, lengths=lengths, first=first, layer=layer
    )
    rows, group, dim = queries.shape
    padding = ((0, 0), (0, padded_size(group) - group), (0, padded_size(dim) - dim))
    queries = jnp.pad(queries.astype(k.dtype), padding)
    padded, width = queries.shape[1:]
    blocks = pl.cdiv(n * unit, TOKENS)
    splits = max(1, min(blocks, PROGRAMS // rows))
    plan = SplitPlan(unit, n, pl.cdiv(blocks, splits), dim, heads, scale)
    stats = jax.ShapeDtypeStruct((rows, splits, padded), jnp.float32)
    out_shape = [stats, stats, jax.ShapeDtypeStruct((rows, splits, padded, width), jnp.float32)]
    options = dict(grid=(rows, splits), out_shape=out_shape, warps=4, interpret=interpret, name="attend_to_tokens")
    top, total, out = launch(functools.partial(_kernel, plan=plan), (base, units, bounds, queries, k, v), **options)
    highest = jnp.max(top, axis=1)
    kept = jnp.exp(top - highest[:, None])
    parts = highest, jnp.sum(total * kept, axis=1), jnp.sum(out * kept[..., None], axis=1)
    top, total, out = (part[:, :group] for part in parts)
    return finish((top, total, out[..., :dim]), q, new_k, new_v, scale, return_residual)


def _kernel(base_ref, units_ref, bounds_ref, q_ref, k_ref, v_ref, top_ref, total_ref, out_ref, *, plan):
    unit, n, share, dim, heads, scale = plan
    row, split = pl.program_id(0), pl.program_id(1)
    begin, end = bounds_ref[row // heads, 0], bounds_ref[row // heads, 1]
    source = base_ref[0] + row
    queries = q_ref[row]
    padded, width = queries.shape
    column = jnp.arange(width, dtype=jnp.int32)

    def attend(i, carry):
        top, total, out = carry
        slot = (split * share + i) * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
        listed = slot < n * unit
        chosen = plgpu.load(units_ref.at[row, slot // unit], mask=listed, other=-1)
        position = chosen * unit + slot % unit
        seen = listed & (chosen >= 0) & (position >= begin) & (position < end)
        position = jnp.where(seen, position, 0)
        shape = (TOKENS, width)
        inside = jnp.broadcast_to(seen[:, None], shape) & (column < dim)[None, :]
        at = (source, jnp.broadcast_to(position[:, None], shape), jnp.broadcast_to(column[None, :], shape))
        keys = plgpu.load(k_ref.at[at], mask=inside, other=0)
        values = plgpu.load(v_ref.at[at], mask=inside, other=0)
        logits = product(queries, keys, (1, 1))
        logits = jnp.where(seen[None, :], logits * np.float32(scale), -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - higher[:, None])
        kept = jnp.exp(top - higher)
        added = product(weights.astype(values.dtype), values)
        return higher, total * kept + jnp.sum(weights, axis=1), out * kept[:, None] + added

    nothing, zero = (jnp.full((padded,), value, jnp.float32) for value in (LOWEST, 0.0))
    empty = nothing, zero, jnp.zeros((padded, width), jnp.float32)
    top, total, out = jax.lax.fori_loop(0, share, attend, empty)
    top_ref[row, split] = top
    total_ref[row, split] = total
    out_ref[row, split] = out
