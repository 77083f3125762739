"""Importance scores on GPU: every program scores a block of tokens for one row."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.arithmetic import finite_or_zero, score_product, total_of
from pallas_kernels.gpu.triton import launch, padded_size
from pallas_kernels.operands import score_operands
from pallas_kernels.reference import LOWEST

TOKENS = 512  # scored by one program
WARPS = 4


class ScorePlan(NamedTuple):
    """Sizes that the kernels are compiled for: G, R, S, the heads of k_imp, and the number of blocks of tokens."""

    group: int
    rank: int
    size: int
    heads: int
    blocks: int


def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, interpret, **options):
    """Scores, float32 [B, K, S]. Arguments as in `api.py`."""
    batch, heads = q_imp.shape[:2]
    key_heads, _, size = k_imp.shape[-3:]
    if normalised and totals is None:
        totals = importance_totals(q_imp, k_imp, lengths, interpret=interpret, **options)
    operands, plan = _padded_operands(q_imp, k_imp, lengths, **options)
    rows, padded = operands[2].shape[:2]
    total = jnp.zeros((rows, padded), jnp.float32)
    if normalised:
        totals = finite_or_zero(totals).reshape(rows, plan.group)
        total = jnp.pad(totals.astype(jnp.float32), ((0, 0), (0, padded - plan.group)))
    out_shape = jax.ShapeDtypeStruct((rows, size), jnp.float32)
    options = dict(grid=(rows, plan.blocks), out_shape=out_shape, warps=WARPS, interpret=interpret)
    kernel = functools.partial(_scores_kernel, plan=plan)
    scores = launch(kernel, (*operands, total), name="importance_scores", **options)
    return jnp.max(scores.reshape(batch, heads, key_heads // heads, size), axis=2)


def importance_totals(q_imp, k_imp, lengths, *, interpret, **options):
    """Log-sum-exps, float32 [B, K, G]. Arguments as in `api.py`."""
    operands, plan = _padded_operands(q_imp, k_imp, lengths, **options)
    rows, padded = operands[2].shape[:2]
    stats = jax.ShapeDtypeStruct((rows, plan.blocks, padded), jnp.float32)
    options = dict(grid=(rows, plan.blocks), out_shape=[stats, stats], warps=WARPS, interpret=interpret)
    kernel = functools.partial(_totals_kernel, plan=plan)
    tops, sums = launch(kernel, operands, name="importance_totals", **options)
    top = jnp.max(tops, axis=1)
    held = jnp.sum(sums * jnp.exp(tops - top[:, None]), axis=1)
    return total_of(top, held)[:, : plan.group].reshape(q_imp.shape[:3])


def _padded_operands(q_imp, k_imp, lengths, **options):
    """The operands, with q_imp padded to the sizes of a product, and the sizes of the kernel."""
    heads = k_imp.shape[-3]
    base, bounds, q_imp, factor, k_imp = score_operands(q_imp, k_imp, lengths, **options)
    _, group, rank = q_imp.shape
    size = k_imp.shape[-1]
    plan = ScorePlan(group, rank, size, heads, pl.cdiv(size, TOKENS))
    padding = ((0, 0), (0, padded_size(group) - group), (0, padded_size(rank) - rank))
    return (base, bounds, jnp.pad(q_imp, padding), factor, k_imp), plan


def _block_scores(base_ref, bounds_ref, q_ref, factor_ref, k_imp_ref, plan):
    """Positions [TOKENS] and scores, float32 [G, TOKENS], of a block; -inf for padding, tokens not seen, and NaN."""
    group, rank, size, heads, _ = plan
    row, block = pl.program_id(0), pl.program_id(1)
    begin, end = bounds_ref[row // heads, 0], bounds_ref[row // heads, 1]
    q_imp = q_ref[row]
    padded, width = q_imp.shape
    position = block * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
    part = jnp.arange(width, dtype=jnp.int32)
    inside = jnp.broadcast_to((position < size)[None, :], (width, TOKENS)) & (part < rank)[:, None]
    at = (jnp.broadcast_to(part[:, None], inside.shape), jnp.broadcast_to(position[None, :], inside.shape))
    k_imp = plgpu.load(k_imp_ref.at[base_ref[0] + row, *at], mask=inside, other=0)
    scores = score_product(q_imp, k_imp)
    seen = ((position >= begin) & (position < end))[None, :]
    seen = jnp.broadcast_to(seen, scores.shape) & (jnp.arange(padded, dtype=jnp.int32) < group)[:, None]
    scores = scores * factor_ref[row]
    return position, jnp.where(seen & (scores == scores), scores, -jnp.inf)


def _totals_kernel(base_ref, bounds_ref, q_ref, factor_ref, k_imp_ref, top_ref, total_ref, *, plan):
    _, scores = _block_scores(base_ref, bounds_ref, q_ref, factor_ref, k_imp_ref, plan)
    top = jnp.maximum(jnp.max(scores, axis=1), LOWEST)
    row, block = pl.program_id(0), pl.program_id(1)
    top_ref[row, block] = top
    total_ref[row, block] = jnp.sum(jnp.exp(scores - top[:, None]), axis=1)


def _scores_kernel(base_ref, bounds_ref, q_ref, factor_ref, k_imp_ref, totals_ref, out_ref, *, plan):
    position, scores = _block_scores(base_ref, bounds_ref, q_ref, factor_ref, k_imp_ref, plan)
    row = pl.program_id(0)
    best = jnp.max(scores - totals_ref[row][:, None], axis=0)
    plgpu.store(out_ref.at[row, position], best, mask=position < plan.size)
