"""Importance scores on TPU. k_imp is read in blocks as wide as fit, and scores are pooled before they are written.

"normalised" pooling needs every head's log-sum-exp before the first score is written, so it takes two passes over the
blocks of a row. If one block holds all of a head's k_imp (up to LONGEST bytes), the second pass finds it in VMEM and
nothing is read twice.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import finite_or_zero, score_product, total_of
from pallas_kernels.operands import cache_row, score_operands
from pallas_kernels.reference import LOWEST

LONGEST = 2**22  # bytes of k_imp in one block
SUBLANES = 8
LANES = 128
VMEM_BYTES = 48 * 2**20


class BlockPlan(NamedTuple):
    """Sizes that the kernel is compiled for: heads of q_imp that share one of k_imp, tokens of a block and of a chunk.

    Then blocks of a row, heads of k_imp, and `counts` and `writes` of `_over_blocks`.
    """

    group: int
    block: int
    chunk: int
    blocks: int
    heads: int
    counts: bool
    writes: bool


def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, interpret, **options):
    """Scores, float32 [B, K, S]. Arguments as in `api.py`."""
    batch, heads = q_imp.shape[:2]
    key_heads, _, size = k_imp.shape[-3:]
    operands = score_operands(q_imp, k_imp, lengths, **options)
    counts = normalised and totals is None
    scores = _over_blocks(operands, totals, key_heads, counts=counts, writes=True, interpret=interpret)
    return jnp.max(scores.reshape(batch, heads, key_heads // heads, size), axis=2)


def importance_totals(q_imp, k_imp, lengths, *, interpret, **options):
    """Log-sum-exps, float32 [B, K, G]. Arguments as in `api.py`."""
    operands = score_operands(q_imp, k_imp, lengths, **options)
    members = operands[2].shape[1]
    totals = _over_blocks(operands, None, k_imp.shape[-3], counts=True, writes=False, interpret=interpret)
    return totals[:, :members, 0].reshape(q_imp.shape[:3])


def _block(size, bytes_a_token):
    """Tokens in a block: all of them, or the largest power of two that fits, at least LANES."""
    if size * bytes_a_token <= LONGEST or size <= LANES:
        return size
    return max(LANES, 1 << ((LONGEST // bytes_a_token).bit_length() - 1))


def _over_blocks(operands, given, heads, *, counts, writes, interpret):
    """Scores [rows, 1, S] of q_imp [rows, G, R] and k_imp [L*B*Q, R, S], pooled over G, or log-sum-exps; float32.

    With counts, a first pass computes the log-sum-exps. With writes, they, or those given, are subtracted from the
    scores. Without it they are the result, [rows, G rounded up, 128].
    """
    layers, bounds, q_imp, factor, k_imp = operands
    rows, group, rank = q_imp.shape
    size = k_imp.shape[-1]
    padding = ((0, 0), (0, -group % SUBLANES), (0, 0))
    q_imp = jnp.pad(q_imp, padding)
    padded = q_imp.shape[1]
    given = jnp.zeros((rows, group, 1)) if given is None else given
    given = jnp.pad(given.astype(jnp.float32).reshape(rows, group, 1), padding)
    block = _block(size, rank * k_imp.dtype.itemsize)
    blocks = pl.cdiv(size, block)
    passes = counts + writes
    chunk = next((c for c in (2048, 1024, 512, 256, 128) if block % c == 0), block)
    plan = BlockPlan(group, block, chunk, blocks, heads, counts, writes)
    whole = lambda row, p, n, *_: (row, 0, 0)  # noqa: E731
    out = jax.ShapeDtypeStruct((rows, 1, size) if writes else (rows, padded, LANES), jnp.float32)
    place = pl.BlockSpec((1, 1, block), lambda row, p, n, *_: (row, 0, n * p if passes > 1 else n))
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, passes, blocks),
            in_specs=[
                pl.BlockSpec((1, padded, rank), whole),
                pl.BlockSpec((1, 1, 1), whole),
                pl.BlockSpec((1, padded, 1), whole),
                pl.BlockSpec((1, rank, block), lambda row, p, n, at, _: (cache_row(at, row, rows, heads), 0, n)),
            ],
            out_specs=place if writes else pl.BlockSpec((1, padded, LANES), whole),
            scratch_shapes=[pltpu.VMEM((padded, LANES), jnp.float32)] * 2,
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * passes * rows * padded * rank * size,
            transcendentals=rows * padded * size * counts,
            bytes_accessed=rows * size * (rank * k_imp.dtype.itemsize + 4),
        ),
        interpret=interpret,
        name="importance_scores" if writes else "importance_totals",
    )(layers, bounds, q_imp, factor.reshape(-1, 1, 1), given, k_imp)


def _kernel(layers_ref, bounds_ref, q_ref, factor_ref, given_ref, k_imp_ref, out_ref, top_ref, total_ref, *, plan):
    group, block, chunk, blocks, heads, counts, writes = plan
    del layers_ref  # only the index map of k_imp uses it
    row, phase, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    begin, end = bounds_ref[row // heads, 0], bounds_ref[row // heads, 1]
    q_imp = q_ref[0]
    padded = q_imp.shape[0]
    factor = factor_ref[0]  # [1, 1]

    def scores(at):
        """Scores, float32 [G, chunk]; -inf for heads of the padding, tokens not seen, and NaN."""
        k_imp = k_imp_ref[0, :, pl.ds(at, chunk)]
        found = score_product(q_imp, k_imp)
        found = found * jnp.broadcast_to(factor, found.shape)
        position = index * block + at + jax.lax.broadcasted_iota(jnp.int32, (padded, chunk), 1)
        head = jax.lax.broadcasted_iota(jnp.int32, (padded, chunk), 0)
        seen = (position >= begin) & (position < end) & (head < group)
        return jnp.where(seen & (found == found), found, -jnp.inf)

    def each_chunk(body, carry):
        """Fold body(first token of a chunk, carry) over the block."""
        if chunk == block:
            return body(0, carry)
        return jax.lax.fori_loop(0, block // chunk, lambda i, c: body(pl.multiple_of(i * chunk, chunk), c), carry)

    def totals():
        """The log-sum-exps, float32 [G, 1], once all blocks are counted."""
        return total_of(top_ref[:, :1], total_ref[:, :1])

    if counts:

        @pl.when((phase == 0) & (index == 0))
        def _():
            top_ref[...] = jnp.full(top_ref.shape, LOWEST, jnp.float32)
            total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

        @pl.when(phase == 0)
        def _():
            def add(at, carry):
                top, total = carry
                found = scores(at)
                higher = jnp.maximum(top, jnp.max(found, axis=1, keepdims=True))
                return higher, total * jnp.exp(top - higher) + jnp.sum(jnp.exp(found - higher), axis=1, keepdims=True)

            top, total = each_chunk(add, (top_ref[:, :1], total_ref[:, :1]))
            top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
            total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    if not writes:

        @pl.when(index == blocks - 1)
        def _():
            out_ref[0] = jnp.broadcast_to(totals(), out_ref.shape[1:])

        return

    @pl.when(phase == (1 if counts else 0))
    def _():
        off = finite_or_zero(totals() if counts else given_ref[0])

        def write(at, carry):
            out_ref[0, :, pl.ds(at, chunk)] = jnp.max(scores(at) - off, axis=0, keepdims=True)
            return carry

        each_chunk(write, 0)
