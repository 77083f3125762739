"""Importance scores on TPU. k_imp is read once, in blocks, and scores are pooled before they are written.

Heads of k_imp are multiplied together: their channels follow each other in one matrix, and each row of the other one
has the numbers of one query head and is 0 elsewhere. So a product is as deep as the matrix unit, and rows of different
heads fill the eight sublanes of a register. A number of k_imp that is not finite makes the token's scores NaN, and so
-inf, for all heads of the product.

"normalised" pooling needs every head's log-sum-exp before the first score is written. So the scores of a row wait in
VMEM. Where they do not fit, k_imp is read twice.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import finite_or_zero, score_product, total_of
from pallas_kernels.operands import cache_row
from pallas_kernels.reference import LOWEST
from pallas_kernels.tpu.operands import score_operands
from pallas_kernels.tpu.registers import LANES, SUBLANES, lane_slices

DEPTH = 128  # channels that one product sums over, at most, where it is of several heads
BLOCK = 8192  # tokens of a block
SCORED = 16384  # scores that are formed at a time
HELD = 48 * 2**20  # bytes of VMEM for scores that wait, and for those of two rows that are written
VMEM_BYTES = 56 * 2**20


class BlockPlan(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        heads, padded, group: Heads of k_imp of a program, the same rounded up to a power of two or to eights, and query
            heads of each. Query head g of head h is row g * padded + h.
        sequences: Programs that share a row of the cache.
        size, block, chunk: Tokens of a row, of a block, and those that are scored at a time.
        counts: Whether log-sum-exps are computed. They are the result, or they are taken off.
        writes: Whether scores are the result.
    """

    heads: int
    padded: int
    group: int
    sequences: int
    size: int
    block: int
    chunk: int
    counts: bool
    writes: bool

    @property
    def rows(self):
        """Rows of a program, in whole eights."""
        return -(-self.group * self.padded // SUBLANES) * SUBLANES

    @property
    def held(self):
        """Whether scores wait for the log-sum-exps."""
        return self.counts and self.writes

    @property
    def blocks(self):
        """Blocks of a row."""
        return pl.cdiv(self.size, self.block)

    @property
    def room(self):
        """Tokens of all blocks."""
        return self.blocks * self.block


def importance_scores(q_imp, k_imp, lengths, *, normalised, totals, offset, interpret, **options):
    """Scores, float32 [B, K, S]. Arguments as in `api.py`."""
    batch, heads = q_imp.shape[:2]
    key_heads, _, size = k_imp.shape[-3:]
    operands = score_operands(q_imp, k_imp, lengths, **options)
    counts = normalised and totals is None
    plan = _plan(operands, key_heads, counts, True)
    if plan is None:  # the scores of one head do not fit
        totals = finite_or_zero(importance_totals(q_imp, k_imp, lengths, interpret=interpret, **options))
        plan = _plan(operands, key_heads, False, True)
    if offset is not None:
        totals = -offset if totals is None else totals - offset
    scores = _over_blocks(operands, totals, plan, interpret=interpret)
    return jnp.max(scores.reshape(batch, heads, key_heads // heads, size), axis=2)


def importance_totals(q_imp, k_imp, lengths, *, interpret, **options):
    """Log-sum-exps, float32 [B, K, G]. Arguments as in `api.py`."""
    operands = score_operands(q_imp, k_imp, lengths, **options)
    plan = _plan(operands, k_imp.shape[-3], True, False)
    totals = _over_blocks(operands, None, plan, interpret=interpret)[:, : plan.group * plan.padded, 0]
    totals = totals.reshape(-1, plan.group, plan.padded)[..., : plan.heads]
    return jnp.swapaxes(totals, 1, 2).reshape(q_imp.shape[:3])


def _plan(operands, key_heads, counts, writes):
    """The plan with as many heads of k_imp together as a product and the VMEM hold; None where not one fits."""
    _, _, q_imp, _, k_imp = operands
    group, rank = q_imp.shape[1:]
    size = k_imp.shape[-1]
    block = size if size <= BLOCK else next((b for b in (BLOCK, 4096, 2048, 1024) if size % b == 0), BLOCK)
    most = max(1, DEPTH // rank) if rank % SUBLANES == 0 else 1  # others lie in memory with gaps
    for heads in sorted((h for h in range(1, most + 1) if key_heads % h == 0), reverse=True):
        padded = 1 << (heads - 1).bit_length() if heads <= SUBLANES else -(-heads // SUBLANES) * SUBLANES
        plan = BlockPlan(heads, padded, group, key_heads // heads, size, block, block, counts, writes)
        if not plan.held or 4 * plan.room * (plan.rows + 2 * heads) <= HELD:
            fitting = max(LANES, SCORED // plan.rows)
            chunk = next((c for c in (2048, 1024, 512, 256, 128) if c <= fitting and block % c == 0), block)
            return plan._replace(chunk=chunk)
    return None


def _in_rows(values, plan):
    """Values [B*Q, G, ...] in the rows of each program, [programs, rows, ...]; 0 in rows without a query head."""
    rest = values.shape[2:]
    values = jnp.swapaxes(values.reshape(-1, plan.heads, plan.group, *rest), 1, 2)
    values = jnp.pad(values, ((0, 0), (0, 0), (0, plan.padded - plan.heads)) + ((0, 0),) * len(rest))
    values = values.reshape(values.shape[0], -1, *rest)
    return jnp.pad(values, ((0, 0), (0, plan.rows - values.shape[1])) + ((0, 0),) * len(rest))


def _over_blocks(operands, given, plan, *, interpret):
    """Scores [B*Q, S], pooled over the query heads, or log-sum-exps [programs, rows, 128]; float32.

    given: what is subtracted from the scores [B, K, G], besides the log-sum-exps that are computed; or None.
    """
    layers, bounds, q_imp, factor, k_imp = operands
    rows, group, rank = q_imp.shape
    programs, depth = rows // plan.heads, plan.heads * rank
    factor = _in_rows(jnp.broadcast_to(jnp.asarray(factor)[:, None, None], (rows, group, 1)), plan)
    own = np.eye(plan.heads, dtype=bool)[None, :, None, :, None]  # each head's numbers in its own channels
    apart = jnp.where(own, q_imp.reshape(programs, plan.heads, group, 1, rank), 0)
    q_imp = _in_rows(apart.reshape(rows, group, depth), plan)
    off = [] if given is None else [_in_rows(given.astype(jnp.float32).reshape(rows, group, 1), plan)]
    whole = lambda program, n, *_: (program, 0, 0)  # noqa: E731
    column = pl.BlockSpec((1, plan.rows, 1), whole)

    def keys(program, n, layers, bounds):
        """The block of k_imp, or the last one of which the row sees a token."""
        end = jnp.clip(bounds[program // plan.sequences, 1], 1, plan.size)
        return cache_row(layers, program, programs, plan.sequences), 0, jnp.minimum(n, (end - 1) // plan.block)

    out = (plan.heads, plan.room) if plan.writes else (plan.rows, LANES)
    place = pl.BlockSpec((1, *out), whole)
    if not plan.counts:
        place = pl.BlockSpec((1, plan.heads, plan.block), lambda program, n, *_: (program, 0, n))
    stats = [pltpu.VMEM((plan.rows, LANES), jnp.float32)] * 2 * plan.counts
    waiting = [pltpu.VMEM((plan.rows, plan.room), jnp.float32)] * plan.held
    found = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(programs, plan.blocks),
            in_specs=[
                pl.BlockSpec((1, depth, plan.block), keys),
                pl.BlockSpec((1, plan.rows, depth), whole),
                column,
                *[column] * len(off),
            ],
            out_specs=place,
            scratch_shapes=stats + waiting,
        ),
        out_shape=jax.ShapeDtypeStruct((programs, *out), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * programs * plan.rows * depth * plan.size,
            transcendentals=programs * plan.rows * plan.size * plan.counts,
            bytes_accessed=rows * plan.size * (rank * k_imp.dtype.itemsize + 4),
        ),
        interpret=interpret,
        name="importance_scores" if plan.writes else "importance_totals",
    )(layers, bounds, k_imp.reshape(-1, depth, plan.size), q_imp, factor, *off)
    return found.reshape(rows, -1)[:, : plan.size] if plan.writes else found


def _kernel(layers_ref, bounds_ref, k_imp_ref, q_ref, factor_ref, *refs, plan):
    del layers_ref  # only the index map of k_imp uses it
    program, index = pl.program_id(0), pl.program_id(1)
    begin, end = (bounds_ref[program // plan.sequences, i] for i in range(2))
    end = jnp.minimum(end, plan.size)
    q_imp, factor = q_ref[0], factor_ref[0]

    def scores(at):
        """Scores, float32 [rows, chunk]; -inf for rows without a query head, tokens not seen, and NaN."""
        found = score_product(q_imp, k_imp_ref[0, :, pl.ds(at, plan.chunk)]) * factor
        position = index * plan.block + at + jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.chunk), 1)
        unseen = jnp.where((position >= begin) & (position < end), 0.0, -jnp.inf)
        found = found + jnp.concatenate([unseen] * (plan.rows // SUBLANES))
        if plan.rows > plan.group * plan.padded:
            row = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0)
            found = jnp.where(row < plan.group * plan.padded, found, -jnp.inf)
        return jnp.where(found == found, found, -jnp.inf)

    def pooled(found):
        """The maximum over the query heads of each head, [heads, chunk]."""
        if plan.padded % SUBLANES == 0:
            parts = [found[g * plan.padded : (g + 1) * plan.padded] for g in range(plan.group)]
            return functools.reduce(jnp.maximum, parts)[: plan.heads]
        best = functools.reduce(jnp.maximum, [found[at : at + SUBLANES] for at in range(0, plan.rows, SUBLANES)])
        shift = SUBLANES // 2
        while shift >= plan.padded:
            best, shift = jnp.maximum(best, pltpu.roll(best, shift, 0)), shift // 2
        return best[: plan.heads]

    def each_chunk(size, body, carry):
        """Fold body(first token of a chunk, carry) over so many tokens."""
        if size == plan.chunk:
            return body(0, carry)
        steps = size // plan.chunk
        return jax.lax.fori_loop(0, steps, lambda i, c: body(pl.multiple_of(i * plan.chunk, plan.chunk), c), carry)

    def write_chunks(out_ref, size, scores_of, off):
        """Pool and write so many tokens."""

        def write(at, carry):
            out_ref[0, :, pl.ds(at, plan.chunk)] = pooled(scores_of(at) - off)
            return carry

        each_chunk(size, write, 0)

    scratch = len(refs) - 2 * plan.counts - plan.held
    *off_refs, out_ref = refs[:scratch]
    off = finite_or_zero(off_refs[0][0]) if off_refs else 0.0
    if not plan.counts:
        write_chunks(out_ref, plan.block, scores, off)
        return

    top_ref, total_ref, *waiting = refs[scratch:]

    @pl.when(index == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    def add(at, carry):
        """The largest score of every lane, and the sum of exp(score - largest), with those of a chunk."""
        top, total = carry
        found = scores(at)
        if plan.held:  # one block may have any size, and then begins at a number that the compiler knows
            start = at if plan.blocks == 1 else pl.multiple_of(index * plan.block + at, plan.chunk)
            waiting[0][:, pl.ds(start, plan.chunk)] = found
        if plan.chunk % LANES:  # lanes would be left over
            higher = jnp.maximum(top, jnp.max(found, axis=1, keepdims=True))
            sums = jnp.sum(jnp.exp(found - higher[:, :1]), axis=1, keepdims=True)
            lane = jax.lax.broadcasted_iota(jnp.int32, top.shape, 1)
            return higher, total * jnp.exp(top - higher) + jnp.where(lane == 0, sums, 0.0)
        parts = lane_slices(found)
        higher = functools.reduce(jnp.maximum, parts, top)
        sums = functools.reduce(jnp.add, [jnp.exp(part - higher) for part in parts])
        return higher, total * jnp.exp(top - higher) + sums

    top_ref[...], total_ref[...] = each_chunk(plan.block, add, (top_ref[...], total_ref[...]))

    @pl.when(index == plan.blocks - 1)
    def _():
        top = jnp.max(top_ref[...], axis=1, keepdims=True)
        total = total_of(top, jnp.sum(total_ref[...] * jnp.exp(top_ref[...] - top), axis=1, keepdims=True))
        if not plan.writes:
            out_ref[0] = jnp.broadcast_to(total, out_ref.shape[1:])
            return
        write_chunks(out_ref, plan.room, lambda at: waiting[0][:, pl.ds(at, plan.chunk)], finite_or_zero(total) + off)
