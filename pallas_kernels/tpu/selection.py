"""Exact top-k on TPU, eight rows at a time: a search for the threshold, then slots find their units by rank.

The kernel reads scores in blocks and leaves the images of the units in VMEM, where it searches them. All of the search
is comparisons, sums and small matrix products of whole numbers up to 256, which bfloat16 holds exactly. Running counts
are products with a triangle of ones. A one-hot product gives the counts of the 128 units of a slot.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import xla
from pallas_kernels.arithmetic import product
from pallas_kernels.choice import BARRED, TOP, Selection, image_of, rank_image, wanted
from pallas_kernels.threshold import INFINITE, close_bracket, span_counts, spanned_images, tied_units
from pallas_kernels.tpu.operands import bounds
from pallas_kernels.tpu.registers import LANES, SUBLANES, lane_slices

BLOCK = 8192  # tokens of which the images are formed at a time, or those of 128 units where they are more
WIDE = 1024  # units counted at a time
SLOTS = 256  # slots found at a time
VMEM_BYTES = 48 * 2**20
MOST_UNITS = 2**18  # eight rows of more units fill the VMEM; XLA's selection takes those


class ChoicePlan(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        rows, heads: Of all sequences, and of one.
        size: Tokens of a row, or units that are ranked.
        n: Units of a row that are chosen, at most.
        unit, sinks, recent: Of the choice.
        ranked: Whether images are given in place of scores.
        limited: Whether there is a threshold.
        block: Tokens of a block.
        slots: Slots found at a time.
    """

    rows: int
    heads: int
    size: int
    n: int
    unit: int
    sinks: int
    recent: int
    ranked: bool
    limited: bool
    block: int
    slots: int


def select_top_k(scores, lengths, n, *, counts, rules, interpret):
    """The choice of n units; arguments as in `api.py`."""
    batch, heads, size = scores.shape
    rows = batch * heads
    if -(-size // rules.unit) > MOST_UNITS:
        return xla.select_top_k(scores, lengths, n, counts=counts, rules=rules)
    unit, ranked, limit, columns = rules.unit, rules.unit > LANES, rules.threshold, []
    if ranked:  # a unit is more than one row of lanes
        scores, unit, limit = image_of(scores, lengths, rules), 1, None
    if rules.threshold is not None or counts is not None:
        limit = jnp.float32(-jnp.inf) if limit is None else limit.astype(jnp.float32)
        pair = jax.lax.bitcast_convert_type(limit, jnp.int32), wanted(counts, n, (batch, heads)).astype(jnp.int32)
        columns = [jnp.stack([jnp.broadcast_to(one, (batch, heads)) for one in pair], axis=-1).reshape(rows, 2)]
    together = LANES * unit
    plan = ChoicePlan(
        rows=rows,
        heads=heads,
        size=scores.shape[-1],
        n=n,
        unit=unit,
        sinks=rules.sinks,
        recent=rules.recent,
        ranked=ranked,
        limited=rules.threshold is not None,
        block=together * max(1, BLOCK // together),
        slots=min(SLOTS, -(-n // LANES) * LANES),
    )
    scores = scores.astype(jnp.int32 if ranked else jnp.float32).reshape(rows, -1)
    found = _chosen([bounds(lengths, rules.first), scores, *columns], plan, interpret)
    indices, taken = (a[:rows].reshape(batch, heads, -1) for a in found)
    return Selection(indices[..., :n], jnp.arange(n, dtype=jnp.int32)[None, None] < taken[..., :1])


def _chosen(operands, plan, interpret):
    """The chosen units of every row, ascending and then 0, int32 [rows, n rounded up], and their number [rows, 128].

    Rows are rounded up to whole eights. operands: bounds, scores or images, and perhaps thresholds beside counts.
    """
    groups, width = pl.cdiv(plan.rows, SUBLANES), -(-plan.n // plan.slots) * plan.slots
    blocks = pl.cdiv(plan.size, plan.block)
    units = blocks * plan.block // plan.unit
    whole = lambda i, j, *_: (i, 0)  # noqa: E731
    out_shape = [jax.ShapeDtypeStruct((groups * SUBLANES, columns), jnp.int32) for columns in (width, LANES)]
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups, blocks),
            in_specs=[
                pl.BlockSpec((SUBLANES, plan.block), lambda i, j, *_: (i, j)),
                *[pl.BlockSpec((SUBLANES, a.shape[1]), whole) for a in operands[2:]],
            ],
            out_specs=[pl.BlockSpec((SUBLANES, one.shape[1]), whole) for one in out_shape],
            scratch_shapes=[
                pltpu.VMEM((SUBLANES, units), jnp.int32),
                pltpu.VMEM((SUBLANES, units // LANES, LANES), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=40 * plan.rows * units, transcendentals=0, bytes_accessed=4 * plan.rows * plan.size
        ),
        interpret=interpret,
        name="select_top_k",
    )(*operands)


def _whole(a, b, contract=(1, 0)):
    """Product of matrices of whole numbers up to 256, exact: bfloat16 factors, float32 sums."""
    return product(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), contract)


def _triangle(size):
    """A matrix, float32 [size, size], of ones where row <= column and zeros elsewhere."""
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return (row <= column).astype(jnp.float32)


def _part(i, wide):
    return pl.ds(pl.multiple_of(i * wide, wide), wide)


def _over_lanes(combine, part):
    """The fold of the 128 lanes wide slices of a part, [8, 128]."""
    return functools.reduce(combine, lane_slices(part))


def _join_units(image_of_slice, unit):
    """The images of the units of `unit` slices of 128 tokens, int32 [8, 128].

    Two halves of the slices are joined: lanes that differ in one bit of their number hold the larger of two neighbours
    of the one half and of the other. So at last a lane has the number of its slice in its low bits.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)

    def join(at, count):
        if count == 1:
            return image_of_slice(at)
        half = count // 2
        first, second, even = join(at, half), join(at + half, half), (lane & half) == 0
        left = jnp.where(even, first, pltpu.roll(second, half, 1))
        right = jnp.where(even, pltpu.roll(first, LANES - half, 1), second)
        return jnp.maximum(left, right)

    each = LANES // unit  # units of a slice; unit u of slice j lies in lane u * unit + j
    image = join(0, unit)
    return image if unit == 1 else jnp.take_along_axis(image, (lane % each) * unit + lane // each, axis=1)


def _form_images(scores_ref, image_ref, begin, end, limit, plan):
    """Write the images of the units of a block."""
    block = pl.program_id(1)
    start = block * plan.block
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    together = LANES * plan.unit

    def token_images(at):
        """Of 128 tokens of the block."""
        part, position = scores_ref[:, pl.ds(pl.multiple_of(at, LANES), LANES)], start + at + lane
        inside = position < plan.size
        if plan.ranked:
            return jnp.where(inside, part, BARRED)
        rules = dict(sinks=plan.sinks, recent=plan.recent, threshold=limit if plan.limited else None)
        seen = inside & (position >= begin) & (position < end)
        return rank_image(part, seen, end - 1 - position, position, **rules)

    def join(i, carry):
        unit = block * (plan.block // plan.unit) + i * LANES
        image = _join_units(lambda u: token_images(i * together + u * LANES), plan.unit)
        image_ref[:, pl.ds(pl.multiple_of(unit, LANES), LANES)] = image
        return carry

    jax.lax.fori_loop(0, plan.block // together, join, 0)


def _ends(bounds_ref, plan):
    """The first token that each of eight rows sees and the end of its tokens, int32 [8, 1]; 0 beyond the last row."""
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
    begin = end = jnp.zeros((SUBLANES, 1), jnp.int32)
    for i in range(SUBLANES):
        at = pl.program_id(0) * SUBLANES + i
        sequence, own = jnp.minimum(at, plan.rows - 1) // plan.heads, (row == i) & (at < plan.rows)
        begin = jnp.where(own, bounds_ref[sequence, 0], begin)
        end = jnp.where(own, bounds_ref[sequence, 1], end)
    return begin, end


def _kernel(bounds_ref, scores_ref, *refs, plan):
    *columns, out_ref, taken_ref, image_ref, running_ref = refs
    last = pl.program_id(1) == pl.num_programs(1) - 1
    limit, target = None, jnp.full((SUBLANES, 1), plan.n, jnp.int32)
    if columns:
        limit, target = (columns[0][:, i : i + 1] for i in range(2))
        limit = jax.lax.bitcast_convert_type(limit, jnp.float32)
    _form_images(scores_ref, image_ref, *_ends(bounds_ref, plan), limit, plan)

    @pl.when(last)
    def _():
        _search(image_ref, target.astype(jnp.float32), out_ref, taken_ref, running_ref, plan.slots)


def _search(image_ref, target, out_ref, taken_ref, running_ref, slots):
    """Write the `target` [8, 1] units with the largest images, or all where fewer are not BARRED."""
    units, width = image_ref.shape[1], out_ref.shape[1]
    chunks = units // LANES
    wide = next(w for w in (WIDE, WIDE // 2, WIDE // 4, LANES) if units % w == 0)

    def over_parts(add, start):
        """The fold of add(part, total) over the parts of the rows."""
        return jax.lax.fori_loop(0, units // wide, lambda i, total: add(image_ref[:, _part(i, wide)], total), start)

    def number(*tests):
        """For each test how many units pass it, float32 [8, 1]."""

        def add(part, totals):
            found = [_over_lanes(jnp.add, test(part).astype(jnp.float32)) for test in tests]
            return tuple(total + one for total, one in zip(totals, found, strict=True))

        totals = over_parts(add, (jnp.zeros((SUBLANES, LANES), jnp.float32),) * len(tests))
        return [jnp.sum(total, axis=1, keepdims=True) for total in totals]

    def widen(part, ends):
        member = (part >= begin) & (part <= end)
        low = _over_lanes(jnp.minimum, jnp.where(member, part, TOP))
        high = _over_lanes(jnp.maximum, jnp.where(member, part, BARRED))
        return jnp.minimum(ends[0], low), jnp.maximum(ends[1], high)

    first, every = number(lambda part: part > INFINITE, lambda part: part > BARRED)
    target = jnp.minimum(target, every)
    begin, end = spanned_images(first, target)
    widest = tuple(jnp.full((SUBLANES, LANES), value, jnp.int32) for value in (TOP, BARRED))
    low, high = over_parts(widen, widest)
    low, high = jnp.min(low, axis=1, keepdims=True), jnp.max(high, axis=1, keepdims=True)
    bracket = span_counts(low, high + 1, first, every, target)
    found = close_bracket(
        lambda trial: number(lambda part: part >= trial)[0],
        bracket,
        target,
        any_row=lambda rows: jnp.sum(rows.astype(jnp.float32)) > 0,
    )
    limit, missing = found.low, tied_units(found, target)
    triangle = _triangle(LANES)

    def mark(chunk, ties):
        part = image_ref[:, _part(chunk, LANES)]
        equal = (part == limit).astype(jnp.float32)
        order = ties + _whole(equal, triangle)
        chosen = jnp.where(part > limit, 1.0, jnp.where((equal > 0) & (order <= missing), 1.0, 0.0))
        running_ref[:, pl.ds(chunk, 1), :] = _whole(chosen, triangle)[:, None, :]
        return order[:, LANES - 1 :]

    jax.lax.fori_loop(0, chunks, mark, jnp.zeros((SUBLANES, 1), jnp.float32))
    taken_ref[...] = jnp.broadcast_to(target.astype(jnp.int32), taken_ref.shape)
    lower = _triangle(chunks).T

    for row in range(SUBLANES):
        running = running_ref[row]  # [chunks, 128], counts within a chunk
        end = _whole(lower, running)[:, LANES - 1 :]  # [chunks, 1], counts up to a chunk's end
        begin = end - running[:, LANES - 1 :]

        def find(i, carry, row=row, running=running, begin=begin, end=end):
            slot = (i * slots + jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1)).astype(jnp.float32)
            here = ((begin <= slot) & (slot < end)).astype(jnp.float32)  # [chunks, slots], one-hot
            chunk = jnp.sum((end <= slot).astype(jnp.float32), axis=0, keepdims=True)
            rank = slot - jnp.sum(here * begin, axis=0, keepdims=True)
            counts = _whole(running, here, (0, 0))  # [128, slots]
            unit = jnp.sum((counts <= rank).astype(jnp.float32), axis=0, keepdims=True)
            found = jnp.where(slot < target[row : row + 1], chunk * np.float32(LANES) + unit, 0.0)
            out_ref[pl.ds(row, 1), _part(i, slots)] = found.astype(jnp.int32)
            return carry

        jax.lax.fori_loop(0, width // slots, find, 0)
