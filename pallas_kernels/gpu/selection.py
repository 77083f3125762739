"""Exact selection on GPU: a kernel finds the threshold of each row, and another writes the units that reach it.

The threshold kernel has one program a row. It holds the row's image in registers, where it fits, and bisects the
threshold by counting. A trial that as many units reach as are wanted ends the search. The writing kernel has several
programs a row. Each counts what is chosen before its own part, and writes that part behind it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.choice import BARRED, TOP, count_of, image_of, listed, pad_barred
from pallas_kernels.gpu.tiles import current_tiles
from pallas_kernels.gpu.triton import launch, padded_size


def select_top_k(scores, lengths, n, *, counts, rules, interpret):
    """The choice of n units; arguments as in `api.py`."""
    batch, heads, size = scores.shape
    rows = batch * heads
    image = image_of(scores, lengths, rules)
    count = count_of(image, size, lengths, n, counts, rules)
    units = padded_size(image.shape[-1])
    tiles = current_tiles()
    held, written = units if units <= tiles.held else tiles.read, min(tiles.written, units)
    image = pad_barred(image.reshape(rows, -1), max(held, written))
    target = count.reshape(rows)
    limit = launch(
        functools.partial(_threshold_kernel, blocks=image.shape[1] // held, block=held),
        (image, target),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, 2), jnp.int32),
        warps=max(1, min(tiles.threshold_warps, held // 128)),
        interpret=interpret,
        name="find_threshold",
    )
    indices = launch(
        functools.partial(_write_kernel, block=written, counted=min(tiles.counted, units)),
        (image, target, limit),
        grid=(rows, image.shape[1] // written),
        out_shape=jax.ShapeDtypeStruct((rows, n + 1), jnp.int32),
        warps=8,
        interpret=interpret,
        name="write_chosen",
    )[:, :n]
    return listed(indices.reshape(batch, heads, n), count)


def _threshold_kernel(image_ref, target_ref, out_ref, *, blocks, block):
    """The threshold of a row, and how many of the units that equal it are chosen."""
    row = pl.program_id(0)
    target = target_ref[row]
    whole = image_ref[row, pl.ds(0, block)] if blocks == 1 else None

    def count(trial):
        """How many units reach a trial value."""

        def add(i, total):
            return total + _number(image_ref[row, pl.ds(i * block, block)] >= trial)

        return _number(whole >= trial) if blocks == 1 else jax.lax.fori_loop(0, blocks, add, jnp.int32(0))

    def narrow(state):
        """At least `target` units reach low, and fewer reach high."""
        low, high = state
        middle = (low & high) + ((low ^ high) >> 1)  # their mean without overflow
        reached = count(middle)
        low = jnp.where(reached >= target, middle, low)
        high = jnp.where(reached <= target, middle, high)  # where they are equal, the search ends
        return low, high

    def unfinished(state):
        gap = state[1] - state[0]  # modulo 2**32
        return (gap != 0) & (gap != 1)

    limit, _ = jax.lax.while_loop(unfinished, narrow, (jnp.int32(BARRED), jnp.int32(TOP + 1)))
    out_ref[row, 0] = limit
    out_ref[row, 1] = target - count(limit + 1)


def _write_kernel(image_ref, target_ref, limit_ref, out_ref, *, block, counted):
    """Write the chosen units of one part of a row behind those of the parts before."""
    row, part = pl.program_id(0), pl.program_id(1)
    target, limit, ties = target_ref[row], limit_ref[row, 0], limit_ref[row, 1]
    begin = part * block

    def add(i, totals):
        at = i * counted + jnp.arange(counted, dtype=jnp.int32)
        image = plgpu.load(image_ref.at[row, at], mask=at < begin, other=BARRED)
        return totals[0] + _number(image > limit), totals[1] + _number((image == limit) & (at < begin))

    above, equal = jax.lax.fori_loop(0, pl.cdiv(begin, counted), add, (jnp.int32(0), jnp.int32(0)))
    image = image_ref[row, pl.ds(begin, block)]
    same = (image == limit).astype(jnp.int32)
    chosen = (image > limit) | ((same > 0) & (equal + jnp.cumsum(same) <= ties))
    place = above + jnp.minimum(equal, ties) + jnp.cumsum(chosen.astype(jnp.int32)) - 1
    kept = chosen & (place < target)
    last = out_ref.shape[1] - 1  # not returned: units that are not kept point to it
    position = begin + jnp.arange(block, dtype=jnp.int32)
    plgpu.store(out_ref.at[row, jnp.where(kept, place, last)], position, mask=kept)


def _number(mask):
    return jnp.sum(mask.astype(jnp.int32))
