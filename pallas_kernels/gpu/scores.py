"""Importance scores on GPU: every program scores a block of tokens for one row."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.arithmetic import finite_or_zero, score_product, total_of
from pallas_kernels.gpu.tiles import current_tiles
from pallas_kernels.gpu.triton import launch, padded_size, place_operands, seen_range
from pallas_kernels.operands import score_factor
from pallas_kernels.reference import LOWEST

SCORED = 16384  # elements of q_imp or k_imp times tokens that a program holds without spilling registers
JOINED = 128  # blocks whose log-sum-exps are joined at a time
ADDRESSED = 2**31  # offsets in arrays of up to 4 GiB are signed numbers of 32 bits


class ScorePlan(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        tokens, warps: Of a program.
        group, rank, size, heads: G, R, S, and the heads of k_imp.
        normalised: Whether log-sum-exps are taken off.
    """

    tokens: int
    warps: int
    group: int
    rank: int
    size: int
    heads: int
    normalised: bool


def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, interpret, **options):
    """Scores, float32 [B, K, S]. Arguments as in `api.py`."""
    batch, heads = q_imp.shape[:2]
    key_heads, _, size = k_imp.shape[-3:]
    operands, plan = _operands(q_imp, k_imp, lengths, normalised, **options)
    stats = ()
    if normalised and totals is None:
        stats = _block_totals(operands, plan, interpret)
    elif normalised:
        totals = totals.astype(jnp.float32).reshape(-1, 1, plan.group)
        stats = totals, jnp.ones_like(totals)
    scores = launch(
        functools.partial(_scores_kernel, plan=plan),
        (*operands, *stats),
        grid=(batch * key_heads, pl.cdiv(size, plan.tokens)),
        out_shape=jax.ShapeDtypeStruct((batch * key_heads, size), jnp.float32),
        warps=plan.warps,
        interpret=interpret,
        name="importance_scores",
    )
    return jnp.max(scores.reshape(batch, heads, key_heads // heads, size), axis=2)


def importance_totals(q_imp, k_imp, lengths, *, interpret, **options):
    """Log-sum-exps, float32 [B, K, G]. Arguments as in `api.py`."""
    tops, sums = _block_totals(*_operands(q_imp, k_imp, lengths, True, **options), interpret)
    top = jnp.max(tops, axis=1)
    return total_of(top, jnp.sum(sums * jnp.exp(tops - top[:, None]), axis=1)).reshape(q_imp.shape[:3])


def _operands(q_imp, k_imp, lengths, normalised, *, scales, scale, first, layer):
    """The operands of both kernels, and their plan."""
    batch = q_imp.shape[0]
    k_imp, layer = _addressable(k_imp, layer)
    heads, rank, size = k_imp.shape[-3:]
    q_imp = q_imp.reshape(batch * heads, -1, rank)
    factor = score_factor(batch, heads, scales, scale)
    places = place_operands(layer, lengths, first, batch, size)
    tiles = current_tiles()
    tokens = min(tiles.score_tokens, max(64, SCORED // padded_size(max(rank, q_imp.shape[1]))))
    plan = ScorePlan(tokens, tiles.score_warps, q_imp.shape[1], rank, size, heads, normalised)
    return (*places, q_imp, factor, k_imp.reshape(-1, rank, size)), plan


def _addressable(k_imp, layer):
    """k_imp and the layer to read in it. Of an array with offsets beyond 32 bits, it is a copy of the layer alone.

    Pallas has offsets of 64 bits for arrays beyond 4 GiB, and 2**31 elements of two bytes are as many. So only int8
    arrays are concerned.
    """
    if not (k_imp.dtype.itemsize == 1 and ADDRESSED < k_imp.size <= 2 * ADDRESSED):
        return k_imp, layer
    if layer is not None:
        k_imp = jax.lax.dynamic_index_in_dim(k_imp, layer, keepdims=False)
    if k_imp.size > ADDRESSED:
        raise ValueError(
            f"k_imp {k_imp.shape} in {k_imp.dtype} has more than 2 GiB and at most 4 GiB, which GPU kernels cannot "
            "address; split the batch, or keep k_imp in bfloat16"
        )
    return k_imp, None


def _block_totals(operands, plan, interpret):
    """The largest score of every block of tokens and the sum of exp(score - largest), [rows, blocks, G] each."""
    rows, blocks = operands[3].shape[0], pl.cdiv(plan.size, plan.tokens)
    stats = jax.ShapeDtypeStruct((rows, blocks, plan.group), jnp.float32)
    return launch(
        functools.partial(_totals_kernel, plan=plan),
        operands,
        grid=(rows, blocks),
        out_shape=[stats, stats],
        warps=plan.warps,
        interpret=interpret,
        name="importance_totals",
    )


def _block_scores(layer_ref, lengths_ref, first_ref, q_ref, factor_ref, k_imp_ref, plan):
    """Positions, heads, and their scores, float32, of a block; -inf for padding, tokens not seen, and NaN."""
    tokens, _, group, rank, size, heads, _ = plan
    row, block = pl.program_id(0), pl.program_id(1)
    begin, end = seen_range(lengths_ref, first_ref, row // heads, size)
    head, part = (jnp.arange(padded_size(s), dtype=jnp.int32) for s in (group, rank))
    position = block * tokens + jnp.arange(tokens, dtype=jnp.int32)
    seen = (position >= begin) & (position < end)
    inside = (head < group)[:, None] & (part < rank)[None, :]
    at = jnp.broadcast_to(head[:, None], inside.shape), jnp.broadcast_to(part[None, :], inside.shape)
    q_imp = plgpu.load(q_ref.at[(row, *at)], mask=inside, other=0)
    inside = (part < rank)[:, None] & seen[None, :]
    at = jnp.broadcast_to(part[:, None], inside.shape), jnp.broadcast_to(position[None, :], inside.shape)
    source = layer_ref[0] * q_ref.shape[0] + row
    k_imp = plgpu.load(k_imp_ref.at[(source, *at)], mask=inside, other=0)
    scores = score_product(q_imp, k_imp) * factor_ref[row]
    counted = (head < group)[:, None] & seen[None, :]
    return position, head, jnp.where(counted & (scores == scores), scores, -jnp.inf)


def _totals_kernel(layer_ref, lengths_ref, first_ref, q_ref, factor_ref, k_imp_ref, top_ref, total_ref, *, plan):
    _, head, scores = _block_scores(layer_ref, lengths_ref, first_ref, q_ref, factor_ref, k_imp_ref, plan)
    top = jnp.maximum(jnp.max(scores, axis=1), LOWEST)
    row, block = pl.program_id(0), pl.program_id(1)
    own = head < plan.group
    plgpu.store(top_ref.at[row, block, head], top, mask=own)
    plgpu.store(total_ref.at[row, block, head], jnp.sum(jnp.exp(scores - top[:, None]), axis=1), mask=own)


def _scores_kernel(layer_ref, lengths_ref, first_ref, q_ref, factor_ref, k_imp_ref, *refs, plan):
    *stats, out_ref = refs
    position, head, scores = _block_scores(layer_ref, lengths_ref, first_ref, q_ref, factor_ref, k_imp_ref, plan)
    row = pl.program_id(0)
    if plan.normalised:
        scores = scores - finite_or_zero(_log_sum_exp(*stats, row, head, plan.group))[:, None]
    plgpu.store(out_ref.at[row, position], jnp.max(scores, axis=0), mask=position < plan.size)


def _log_sum_exp(tops_ref, sums_ref, row, head, group):
    """The log-sum-exp of every query head of a row, from those of its blocks."""
    blocks = tops_ref.shape[1]

    def join(i, carry):
        block = i * tile + jnp.arange(tile, dtype=jnp.int32)
        inside = (block < blocks)[:, None] & (head < group)[None, :]
        at = jnp.broadcast_to(block[:, None], inside.shape), jnp.broadcast_to(head[None, :], inside.shape)
        tops = plgpu.load(tops_ref.at[(row, *at)], mask=inside, other=LOWEST)
        sums = plgpu.load(sums_ref.at[(row, *at)], mask=inside, other=0.0)
        top = jnp.maximum(carry[0], jnp.max(tops, axis=0))
        return top, carry[1] * jnp.exp(carry[0] - top) + jnp.sum(sums * jnp.exp(tops - top[None, :]), axis=0)

    tile = min(JOINED, padded_size(blocks))
    nothing = jnp.full(head.shape, LOWEST, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    return total_of(*jax.lax.fori_loop(0, pl.cdiv(blocks, tile), join, nothing))
