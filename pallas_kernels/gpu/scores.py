"""Importance scores on GPU: every program scores a block of tokens for one KV head.

For the choice that follows, the program writes the images of its units in place of scores: pooling over the group and
over units, sinks, recent tokens and a threshold are done before anything is written.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.arithmetic import finite_or_zero, score_product, total_of
from pallas_kernels.choice import rank_image
from pallas_kernels.gpu.tiles import current_tiles
from pallas_kernels.gpu.triton import cache_row, launch, padded_size, pairs, place_operands, seen_range
from pallas_kernels.reference import LOWEST

SCORED = 16384  # elements of q_imp or k_imp times tokens that a program holds without spilling registers
DEEP = 32  # channels of a float32 product, whose operands lie in registers
JOINED = 128  # blocks whose log-sum-exps are joined at a time
ADDRESSED = 2**31  # offsets in arrays of up to 4 GiB are signed numbers of 32 bits


class ScorePlan(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        tokens, warps: Of a program.
        shared: Heads of k_imp for each KV head.
        group: Query heads for each of them.
        rank, size, heads: R, S, K.
        scale: The factor on the products.
        scales: How many scales of int8 keys there are.
        normalised: Whether log-sum-exps are taken off.
    """

    tokens: int
    warps: int
    shared: int
    group: int
    rank: int
    size: int
    heads: int
    scale: float
    scales: int
    normalised: bool


def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, interpret, **options):
    """Scores, float32 [B, K, S]. Arguments as in `api.py`."""
    operands, plan = _operands(q_imp, k_imp, lengths, normalised, **options)
    return _run_scores(operands, plan, totals, None, interpret).reshape(q_imp.shape[0], plan.heads, plan.size)


def importance_images(q_imp, k_imp, lengths, *, rules, normalised, interpret, **options):
    """Images of units, int32 [B, K, U]. Those that a row does not see have any value. Arguments as in `api.py`."""
    operands, plan = _operands(q_imp, k_imp, lengths, normalised, **options)
    if rules.threshold is not None:
        shape = (q_imp.shape[0], plan.heads)
        operands["threshold"] = jnp.broadcast_to(rules.threshold, shape).astype(jnp.float32).reshape(-1)
    images = _run_scores(operands, plan, None, rules._replace(first=None, threshold=None), interpret)
    return images.reshape(q_imp.shape[0], plan.heads, -1)


def can_image(q_imp, k_imp, unit):
    """Whether a program scores whole units."""
    return unit <= _tokens(q_imp.shape[1] * q_imp.shape[2] // k_imp.shape[-3], k_imp.shape[-2])


def importance_totals(q_imp, k_imp, lengths, *, interpret, **options):
    """Log-sum-exps, float32 [B, K, G]. Arguments as in `api.py`."""
    tops, sums = _block_totals(*_operands(q_imp, k_imp, lengths, True, **options), interpret)
    top = jnp.max(tops, axis=1)
    return total_of(top, jnp.sum(sums * jnp.exp(tops - top[:, None]), axis=1)).reshape(q_imp.shape[:3])


def _tokens(group, rank):
    """Tokens of a program."""
    return min(current_tiles().score_tokens, max(64, SCORED // padded_size(max(rank, group))))


def _operands(q_imp, k_imp, lengths, normalised, *, scales, scale, first, layer):
    """The operands of both kernels, and their plan."""
    k_imp, layer = _addressable(k_imp, layer)
    batch, heads, _, rank = q_imp.shape
    key_heads, _, size = k_imp.shape[-3:]
    q_imp = q_imp.reshape(batch * key_heads, -1, rank)
    scales = None if scales is None else scales.astype(jnp.float32).reshape(-1)
    operands = place_operands(layer, lengths, first)
    operands |= dict(q_imp=q_imp, k_imp=k_imp.reshape(-1, rank, size), scales=scales)
    shared, number = key_heads // heads, 1 if scales is None else scales.size
    tokens, warps = _tokens(q_imp.shape[1], rank), current_tiles().score_warps
    return operands, ScorePlan(
        tokens, warps, shared, q_imp.shape[1], rank, size, heads, float(scale), number, normalised
    )


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


def _run_scores(operands, plan, totals, rules, interpret):
    """Scores float32 [rows, S], or images int32 [rows, U] with rules."""
    if plan.normalised and totals is None:
        operands["tops"], operands["sums"] = _block_totals(operands, plan, interpret)
    elif plan.normalised:
        operands["tops"] = totals.astype(jnp.float32).reshape(-1, 1, plan.group)
    rows = operands["q_imp"].shape[0] // plan.shared
    out_size, dtype = (plan.size, jnp.float32) if rules is None else (pl.cdiv(plan.size, rules.unit), jnp.int32)
    return launch(
        functools.partial(_scores_kernel, plan=plan, rules=rules),
        operands,
        grid=(rows, pl.cdiv(plan.size, plan.tokens)),
        out_shape=jax.ShapeDtypeStruct((rows, out_size), dtype),
        warps=plan.warps,
        interpret=interpret,
        name="importance_scores",
    )


def _block_totals(operands, plan, interpret):
    """The largest score of every block of tokens and the sum of exp(score - largest), [rows, blocks, G] each."""
    rows, blocks = operands["q_imp"].shape[0], pl.cdiv(plan.size, plan.tokens)
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


def _block_scores(refs, row, position, seen, plan):
    """Scores of a block for the query heads of one row of k_imp; -inf for padding, tokens not seen, and NaN."""
    head, depth = jnp.arange(padded_size(plan.group), dtype=jnp.int32), padded_size(plan.rank)
    if jnp.float32 in (refs["q_imp"].dtype, refs["k_imp"].dtype):
        depth = min(depth, DEEP)
    source = cache_row(refs, row, refs["q_imp"].shape[0])

    def add(i, total):
        """Add the products of some channels."""
        part = i * depth + jnp.arange(depth, dtype=jnp.int32)
        inside = (head < plan.group)[:, None] & (part < plan.rank)[None, :]
        q_imp = plgpu.load(refs["q_imp"].at[(row, *pairs(head, part))], mask=inside, other=0)
        inside = (part < plan.rank)[:, None] & seen[None, :]
        k_imp = plgpu.load(refs["k_imp"].at[(source, *pairs(part, position))], mask=inside, other=0)
        return total + score_product(q_imp, k_imp)

    zero = jnp.zeros((head.shape[0], position.shape[0]), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(plan.rank, depth), add, zero) if plan.rank > depth else add(0, zero)
    factor = np.float32(plan.scale)
    if "scales" in refs:
        factor = refs["scales"][row % plan.scales] * factor
    scores = total * factor
    counted = (head < plan.group)[:, None] & seen[None, :]
    return head, jnp.where(counted & (scores == scores), scores, -jnp.inf)


def _totals_kernel(refs, top_ref, total_ref, *, plan):
    row, block = pl.program_id(0), pl.program_id(1)
    position = block * plan.tokens + jnp.arange(plan.tokens, dtype=jnp.int32)
    begin, end = seen_range(refs, row // (plan.heads * plan.shared), plan.size)
    head, scores = _block_scores(refs, row, position, (position >= begin) & (position < end), plan)
    top = jnp.maximum(jnp.max(scores, axis=1), LOWEST)
    own = head < plan.group
    plgpu.store(top_ref.at[row, block, head], top, mask=own)
    plgpu.store(total_ref.at[row, block, head], jnp.sum(jnp.exp(scores - top[:, None]), axis=1), mask=own)


def _scores_kernel(refs, out_ref, *, plan, rules):
    row, start = pl.program_id(0), pl.program_id(1) * plan.tokens
    position = start + jnp.arange(plan.tokens, dtype=jnp.int32)
    begin, end = seen_range(refs, row // plan.heads, plan.size)
    seen = (position >= begin) & (position < end)

    def pooled(key_row):
        """The best score of every token for one row of k_imp."""
        head, scores = _block_scores(refs, key_row, position, seen, plan)
        if plan.normalised:
            scores = scores - finite_or_zero(_log_sum_exp(refs, key_row, head, plan.group))[:, None]
        return jnp.max(scores, axis=0)

    def best():
        if plan.shared == 1:
            return pooled(row)
        lowest = jnp.full(position.shape, -jnp.inf, jnp.float32)
        first = row * plan.shared
        return jax.lax.fori_loop(0, plan.shared, lambda i, top: jnp.maximum(top, pooled(first + i)), lowest)

    if rules is None:
        plgpu.store(out_ref.at[row, position], best(), mask=position < plan.size)
        return

    @pl.when((start < end) & (start + plan.tokens > begin))
    def _write_images():
        limit = refs["threshold"][row] if "threshold" in refs else None
        options = dict(sinks=rules.sinks, recent=rules.recent, threshold=limit)
        age = refs["lengths"][row // plan.heads] - 1 - position
        image = rank_image(best(), seen, age, position, **options)
        if rules.unit > 1:
            image = jnp.max(image.reshape(-1, rules.unit), axis=1)
        at = start // rules.unit + jnp.arange(plan.tokens // rules.unit, dtype=jnp.int32)
        plgpu.store(out_ref.at[row, at], image, mask=at < out_ref.shape[1])


def _log_sum_exp(refs, row, head, group):
    """The log-sum-exp of every query head of a row: that given, or from those of its blocks."""
    tops_ref = refs["tops"]
    if "sums" not in refs:
        return plgpu.load(tops_ref.at[row, 0, head], mask=head < group, other=0.0)
    blocks = tops_ref.shape[1]

    def join(i, carry):
        block = i * tile + jnp.arange(tile, dtype=jnp.int32)
        inside = (block < blocks)[:, None] & (head < group)[None, :]
        at = pairs(block, head)
        tops = plgpu.load(tops_ref.at[(row, *at)], mask=inside, other=LOWEST)
        sums = plgpu.load(refs["sums"].at[(row, *at)], mask=inside, other=0.0)
        top = jnp.maximum(carry[0], jnp.max(tops, axis=0))
        return top, carry[1] * jnp.exp(carry[0] - top) + jnp.sum(sums * jnp.exp(tops - top[None, :]), axis=0)

    tile = min(JOINED, padded_size(blocks))
    nothing = jnp.full(head.shape, LOWEST, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    return total_of(*jax.lax.fori_loop(0, pl.cdiv(blocks, tile), join, nothing))
