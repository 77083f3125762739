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
from pallas_kernels.gpu.triton import (
    launch,
    multiply_add,
    padded_size,
    pairs,
    place_operands,
    seen_range,
    source_row,
)
from pallas_kernels.reference import LOWEST

SCORED = 16384  # elements of q_imp or k_imp times tokens that a program holds without spilling registers
APART = 128  # products for a token up to which they are made without padding the group, head by head
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
        sinks, recent: Tokens at the ends of what a row sees that are not scored.
        normalised: Whether log-sum-exps are taken off.
        interpret: Whether the kernels are interpreted.
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
    sinks: int
    recent: int
    normalised: bool
    interpret: bool

    @property
    def apart(self):
        """Whether the query heads are multiplied one by one."""
        return self.group * self.rank <= APART

    @property
    def head(self):
        """Query heads of a block, padded to a power of two, or to a side of a product."""
        size = 1 << (self.group - 1).bit_length() if self.apart else padded_size(self.group)
        return jnp.arange(size, dtype=jnp.int32)


def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, offset, interpret, **options):
    """Scores, float32 [B, K, S]. Arguments as in `api.py`."""
    operands, plan = _operands(q_imp, k_imp, lengths, normalised, interpret, **options)
    operands["offset"] = None if offset is None else offset.reshape(-1, plan.group)
    return _run_scores(operands, plan, totals, None).reshape(q_imp.shape[0], plan.heads, plan.size)


def importance_images(q_imp, k_imp, lengths, *, rules, normalised, totals, offset, interpret, **options):
    """Images of units, int32 [B, K, U]. Those that a row does not see have any value. Arguments as in `api.py`.

    Sinks and recent tokens are not scored.
    """
    operands, plan = _operands(q_imp, k_imp, lengths, normalised, interpret, **options)
    operands["offset"] = None if offset is None else offset.reshape(-1, plan.group)
    if rules.threshold is not None:
        shape = (q_imp.shape[0], plan.heads)
        operands["threshold"] = jnp.broadcast_to(rules.threshold, shape).astype(jnp.float32).reshape(-1)
    plan = plan._replace(sinks=rules.sinks, recent=rules.recent)
    images = _run_scores(operands, plan, totals, rules._replace(first=None, threshold=None))
    return images.reshape(q_imp.shape[0], plan.heads, -1)


def can_image(q_imp, k_imp, unit):
    """Whether a program scores whole units."""
    return unit <= _tokens(q_imp.shape[1] * q_imp.shape[2] // k_imp.shape[-3], k_imp.shape[-2])


def importance_totals(q_imp, k_imp, lengths, *, interpret, **options):
    """Log-sum-exps, float32 [B, K, G]. Arguments as in `api.py`."""
    tops, sums = _block_totals(*_operands(q_imp, k_imp, lengths, True, interpret, **options))
    top = jnp.max(tops, axis=1)
    return total_of(top, jnp.sum(sums * jnp.exp(tops - top[:, None]), axis=1)).reshape(q_imp.shape[:3])


def _tokens(group, rank):
    """Tokens of a program."""
    return min(current_tiles().score_tokens, max(64, SCORED // padded_size(max(rank, group))))


def _operands(q_imp, k_imp, lengths, normalised, interpret, *, scales, scale, first, layer):
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
    sizes = tokens, warps, shared, q_imp.shape[1], rank, size, heads
    return operands, ScorePlan(*sizes, float(scale), number, 0, 0, normalised, interpret)


def _addressable(k_imp, layer):
    """k_imp and what to read in it. Of an array with offsets beyond 32 bits, it is a copy of what is read alone.

    Pallas has offsets of 64 bits for arrays beyond 4 GiB, and 2**31 elements of two bytes are as many. So only int8
    arrays are concerned.
    """
    if not (k_imp.dtype.itemsize == 1 and ADDRESSED < k_imp.size <= 2 * ADDRESSED):
        return k_imp, layer
    several = np.ndim(layer) == 1
    if layer is not None:
        k_imp = k_imp[jnp.asarray(layer)]
    if k_imp.size > ADDRESSED:
        raise ValueError(
            f"k_imp {k_imp.shape} in {k_imp.dtype} has more than 2 GiB and at most 4 GiB, which GPU kernels cannot "
            "address; split the batch, or keep k_imp in bfloat16"
        )
    return k_imp, jnp.arange(len(k_imp), dtype=jnp.int32) if several else None


def _run_scores(operands, plan, totals, rules):
    """Scores float32 [rows, S], or images int32 [rows, U] with rules."""
    if plan.normalised and totals is None:
        operands["tops"], operands["sums"] = _block_totals(operands, plan)
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
        interpret=plan.interpret,
        name="importance_scores",
    )


def _block_totals(operands, plan):
    """The largest score of every block of tokens and the sum of exp(score - largest), [rows, blocks, G] each."""
    rows, blocks = operands["q_imp"].shape[0], pl.cdiv(plan.size, plan.tokens)
    stats = jax.ShapeDtypeStruct((rows, blocks, plan.group), jnp.float32)
    return launch(
        functools.partial(_totals_kernel, plan=plan),
        operands,
        grid=(rows, blocks),
        out_shape=[stats, stats],
        warps=plan.warps,
        interpret=plan.interpret,
        name="importance_totals",
    )


class TokenBlock(NamedTuple):
    """Tokens that a program scores, [T].

    Attributes:
        position: Their positions in the cache.
        seen: Whether the row sees them, and they are scored.
        loaded: Whether their keys are loaded. The ends of `seen` may lie anywhere, so a mask of it would load every key
            by itself.
        used: Whether any is seen.
    """

    position: jax.Array
    seen: jax.Array
    loaded: jax.Array
    used: jax.Array


def _block_of(refs, sequence, index, plan):
    """The block of a sequence with an index."""
    start = index * plan.tokens
    position = start + jnp.arange(plan.tokens, dtype=jnp.int32)
    begin, end = seen_range(refs, sequence, plan.size)
    begin, end = jnp.maximum(begin, plan.sinks), jnp.minimum(end, refs["lengths"][sequence] - plan.recent)
    used = (start < end) & (start + plan.tokens > begin)
    return TokenBlock(position, (position >= begin) & (position < end), (position < plan.size) & used, used)


def _block_scores(refs, row, block, plan):
    """Scores of a block for the query heads of one row of k_imp; -inf for padding, tokens not seen, and NaN.

    A matrix [G padded, T], or the vectors [T] of the heads apart.
    """
    products = _products_apart if plan.apart else _products
    factor = np.float32(plan.scale)
    if "scales" in refs:
        factor = refs["scales"][row % plan.scales] * factor

    def scaled(total, counted):
        scores = total * factor
        return jnp.where(counted & (scores == scores), scores, -jnp.inf)

    total = products(refs, row, block, plan)
    if plan.apart:
        return [scaled(one, block.seen) for one in total]
    return scaled(total, (plan.head < plan.group)[:, None] & block.seen[None, :])


def _products(refs, row, block, plan):
    """The products of a block, [G padded, T]."""
    head, depth = plan.head, padded_size(plan.rank)
    if jnp.float32 in (refs["q_imp"].dtype, refs["k_imp"].dtype):
        depth = min(depth, DEEP)
    source = source_row(refs, row, refs["q_imp"].shape[0], plan.heads * plan.shared)

    def add(i, total):
        """Add the products of some channels."""
        part = i * depth + jnp.arange(depth, dtype=jnp.int32)
        inside = (head < plan.group)[:, None] & (part < plan.rank)[None, :]
        q_imp = plgpu.load(refs["q_imp"].at[(row, *pairs(head, part))], mask=inside, other=0)
        inside = (part < plan.rank)[:, None] & block.loaded[None, :]
        k_imp = plgpu.load(refs["k_imp"].at[(source, *pairs(part, block.position))], mask=inside, other=0)
        return total + score_product(q_imp, k_imp)

    zero = jnp.zeros((head.shape[0], plan.tokens), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(plan.rank, depth), add, zero) if plan.rank > depth else add(0, zero)


def _products_apart(refs, row, block, plan):
    """The products of a block, [T] of every query head."""
    source = source_row(refs, row, refs["q_imp"].shape[0], plan.heads * plan.shared)
    total = [jnp.zeros(plan.tokens, jnp.float32)] * plan.group
    for channel in range(plan.rank):
        k_imp = plgpu.load(refs["k_imp"].at[source, channel, block.position], mask=block.loaded, other=0)
        for head in range(plan.group):
            total[head] = multiply_add(refs["q_imp"][row, head, channel], k_imp, total[head], plan.interpret)
    return total


def _totals_kernel(refs, top_ref, total_ref, *, plan):
    row, index = pl.program_id(0), pl.program_id(1)
    scores = _block_scores(refs, row, _block_of(refs, row // (plan.heads * plan.shared), index, plan), plan)
    if plan.apart:
        for head, own in enumerate(scores):
            top = jnp.maximum(jnp.max(own), LOWEST)
            top_ref[row, index, head] = top
            total_ref[row, index, head] = jnp.sum(jnp.exp(own - top))
        return
    head, own = plan.head, plan.head < plan.group
    top = jnp.maximum(jnp.max(scores, axis=1), LOWEST)
    plgpu.store(top_ref.at[row, index, head], top, mask=own)
    plgpu.store(total_ref.at[row, index, head], jnp.sum(jnp.exp(scores - top[:, None]), axis=1), mask=own)


def _scores_kernel(refs, out_ref, *, plan, rules):
    row, index = pl.program_id(0), pl.program_id(1)
    block = _block_of(refs, row // plan.heads, index, plan)

    def pooled(key_row):
        """The best score of every token for one row of k_imp."""
        scores = _block_scores(refs, key_row, block, plan)
        if plan.normalised:
            totals = finite_or_zero(_log_sum_exp(refs, key_row, plan))
            if "offset" in refs:
                own = plan.head < plan.group
                totals = totals - plgpu.load(refs["offset"].at[key_row, plan.head], mask=own, other=0.0)
            if plan.apart:
                scores = [own - jnp.sum(jnp.where(plan.head == i, totals, 0)) for i, own in enumerate(scores)]
            else:
                scores = scores - totals[:, None]
        return functools.reduce(jnp.maximum, scores) if plan.apart else jnp.max(scores, axis=0)

    def best():
        if plan.shared == 1:
            return pooled(row)
        lowest = jnp.full(plan.tokens, -jnp.inf, jnp.float32)
        first = row * plan.shared
        return jax.lax.fori_loop(0, plan.shared, lambda i, top: jnp.maximum(top, pooled(first + i)), lowest)

    if rules is None:
        plgpu.store(out_ref.at[row, block.position], best(), mask=block.position < plan.size)
        return

    shown = _block_of(refs, row // plan.heads, index, plan._replace(sinks=0, recent=0))

    @pl.when(shown.used)
    def _write_images():
        limit = refs["threshold"][row] if "threshold" in refs else None
        options = dict(sinks=rules.sinks, recent=rules.recent, threshold=limit)
        age = refs["lengths"][row // plan.heads] - 1 - block.position
        image = rank_image(best(), shown.seen, age, block.position, **options)
        if rules.unit > 1:
            image = jnp.max(image.reshape(-1, rules.unit), axis=1)
        at = index * plan.tokens // rules.unit + jnp.arange(plan.tokens // rules.unit, dtype=jnp.int32)
        plgpu.store(out_ref.at[row, at], image, mask=at < out_ref.shape[1])


def _log_sum_exp(refs, row, plan):
    """The log-sum-exp of every query head of a row: that given, or from those of its blocks."""
    tops_ref, head, group = refs["tops"], plan.head, plan.group
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
