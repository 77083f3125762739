"""Exact top-k on TPU, eight rows at a time: a search for the threshold, then slots find their units by rank.

All of it is comparisons, sums and small matrix products of whole numbers up to 256, which bfloat16 holds exactly.
Running counts are products with a triangle of ones. A one-hot product gives the counts of the 128 units of a slot.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import xla
from pallas_kernels.choice import BARRED, TOP, count_of, image_of, listed
from pallas_kernels.threshold import INFINITE, close_bracket, span_counts, spanned_images, tied_units

LANES = 128
SUBLANES = 8
WIDE = 1024  # units counted at a time
SLOTS = 256  # slots found at a time
VMEM_BYTES = 48 * 2**20
MOST_UNITS = 2**18  # eight rows of more units fill the VMEM; XLA's selection takes those


def select_top_k(scores, lengths, n, *, counts, rules, interpret):
    """The choice of n units; arguments as in `api.py`."""
    batch, heads, size = scores.shape
    rows = batch * heads
    if -(-size // rules.unit) > MOST_UNITS:
        return xla.select_top_k(scores, lengths, n, counts=counts, rules=rules)
    image = image_of(scores, lengths, rules)
    count = count_of(image, size, lengths, n, counts, rules)
    image = image.reshape(rows, -1)
    multiple = WIDE if image.shape[1] > WIDE else LANES
    padding = ((0, -rows % SUBLANES), (0, -image.shape[1] % multiple))
    image = jnp.pad(image, padding, constant_values=BARRED)
    target = jnp.pad(count.reshape(rows, 1), (padding[0], (0, 0)))
    indices = _chosen(image, target, n, min(multiple, image.shape[1]), interpret)
    return listed(indices[:rows, :n].reshape(batch, heads, n), count)


def _chosen(image, target, n, wide, interpret):
    """The positions of the target [rows, 1] largest of image [rows, units], ascending, int32 [rows, n rounded up]."""
    rows, units = image.shape
    slots = min(SLOTS, -(-n // LANES) * LANES)
    width = -(-n // slots) * slots
    chunks = units // LANES
    return pl.pallas_call(
        functools.partial(_kernel, wide=wide, slots=slots),
        grid=(rows // SUBLANES,),
        in_specs=[
            pl.BlockSpec((SUBLANES, units), lambda i: (i, 0)),
            pl.BlockSpec((SUBLANES, 1), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((SUBLANES, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.int32),
        scratch_shapes=[pltpu.VMEM((SUBLANES, chunks, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=40 * rows * units, transcendentals=0, bytes_accessed=4 * rows * units),
        interpret=interpret,
        name="select_top_k",
    )(image, target)


def _whole(a, b, contract=(1, 0)):
    """Product of matrices of whole numbers up to 256, exact: bfloat16 factors, float32 sums."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), dims, preferred_element_type=jnp.float32)


def _triangle(size):
    """A matrix, float32 [size, size], of ones where row <= column and zeros elsewhere."""
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return (row <= column).astype(jnp.float32)


def _part(i, wide):
    return pl.ds(pl.multiple_of(i * wide, wide), wide)


def _number(mask):
    """How many of a part a row has, float32 [8, 1]."""
    return jnp.sum(mask.astype(jnp.float32), axis=1, keepdims=True)


def _kernel(image_ref, target_ref, out_ref, running_ref, *, wide, slots):
    units, width = image_ref.shape[1], out_ref.shape[1]
    chunks = units // LANES
    target = target_ref[...].astype(jnp.float32)  # [8, 1]

    def over_parts(add, start):
        """The fold of add(part, total) over the parts of the rows."""
        return jax.lax.fori_loop(0, units // wide, lambda i, total: add(image_ref[:, _part(i, wide)], total), start)

    def count(trial):
        """How many units reach an image, float32 [8, 1]."""
        return over_parts(lambda part, total: total + _number(part >= trial), nothing)

    def count_both(part, totals):
        return totals[0] + _number(part > INFINITE), totals[1] + _number(part > BARRED)

    def widen(part, ends):
        member = (part >= begin) & (part <= end)
        low = jnp.min(jnp.where(member, part, TOP), axis=1, keepdims=True)
        high = jnp.max(jnp.where(member, part, BARRED), axis=1, keepdims=True)
        return jnp.minimum(ends[0], low), jnp.maximum(ends[1], high)

    nothing = jnp.zeros((SUBLANES, 1), jnp.float32)
    first, every = over_parts(count_both, (nothing, nothing))
    begin, end = spanned_images(first, target)
    widest = jnp.full((SUBLANES, 1), TOP, jnp.int32), jnp.full((SUBLANES, 1), BARRED, jnp.int32)
    low, high = over_parts(widen, widest)
    bracket = span_counts(low, high + 1, first, every, target)
    found = close_bracket(count, bracket, target, any_row=lambda rows: jnp.sum(rows.astype(jnp.float32)) > 0)
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
            found = (chunk * np.float32(LANES) + unit).astype(jnp.int32)
            out_ref[pl.ds(row, 1), _part(i, slots)] = found
            return carry

        jax.lax.fori_loop(0, width // slots, find, 0)
