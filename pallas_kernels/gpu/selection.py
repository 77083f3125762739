"""Exact selection on GPU: a program finds the threshold of one row by counting, then writes the units that reach it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.choice import BARRED, count_of, image_of, listed, pad_barred
from pallas_kernels.gpu.triton import launch, padded_size

UNITS = 2048  # compared at a time


def select_top_k(scores, lengths, n, *, counts, rules, interpret):
    """The choice of n units; arguments as in `api.py`."""
    batch, heads, size = scores.shape
    rows = batch * heads
    image = image_of(scores, lengths, rules)
    count = count_of(image, size, lengths, n, counts, rules)
    block = min(UNITS, padded_size(image.shape[-1]))
    image = pad_barred(image.reshape(rows, -1), block)
    kernel = functools.partial(_kernel, blocks=image.shape[1] // block, block=block)
    out_shape = jax.ShapeDtypeStruct((rows, n + 1), jnp.int32)
    options = dict(grid=(rows,), out_shape=out_shape, warps=8, interpret=interpret, name="select_top_k")
    indices = launch(kernel, (image, count.reshape(rows)), **options)[:, :n]
    return listed(indices.reshape(batch, heads, n), count)


def _kernel(image_ref, target_ref, out_ref, *, blocks, block):
    row = pl.program_id(0)
    target = target_ref[row]

    def part(i):
        return image_ref[row, pl.ds(i * block, block)]

    def count(*trials):
        """How many units reach each of the trial values, in one pass."""

        def add(i, totals):
            image = part(i)
            return tuple(
                total + jnp.sum((image >= trial).astype(jnp.int32)) for total, trial in zip(totals, trials, strict=True)
            )

        return jax.lax.fori_loop(0, blocks, add, tuple(jnp.int32(0) for _ in trials))

    def narrow(step, found):  # two bits of the threshold at a time, the highest first, as an unsigned number
        low = jnp.int32(30) - 2 * step
        trials = tuple(found | jax.lax.shift_left(jnp.int32(bits), low) for bits in (1, 2, 3))
        for trial, reached in zip(trials, count(*(trial ^ BARRED for trial in trials)), strict=True):
            found = jnp.where(reached >= target, trial, found)
        return found

    limit = jax.lax.fori_loop(0, 16, narrow, jnp.int32(0)) ^ BARRED

    def above(i, total):
        return total + jnp.sum((part(i) > limit).astype(jnp.int32))

    missing = target - jax.lax.fori_loop(0, blocks, above, jnp.int32(0))  # how many equal entries are chosen

    def write(i, carry):
        slot, ties = carry
        image = part(i)
        equal = (image == limit).astype(jnp.int32)
        order = ties + jnp.cumsum(equal)
        chosen = (image > limit) | ((equal > 0) & (order <= missing))
        number = chosen.astype(jnp.int32)
        place = slot + jnp.cumsum(number) - 1
        position = i * block + jnp.arange(block, dtype=jnp.int32)
        kept = chosen & (place < target)
        last = out_ref.shape[1] - 1  # not returned: units that are not kept point to it
        plgpu.store(out_ref.at[row, jnp.where(kept, place, last)], position, mask=kept)
        return slot + jnp.sum(number), ties + jnp.sum(equal)

    jax.lax.fori_loop(0, blocks, write, (jnp.int32(0), jnp.int32(0)))
