"""Attention over chosen pages on TPU. Asynchronous copies bring the pages to VMEM, where they are attended in tiles.

VMEM holds a ring of SLOTS tiles. While one tile is attended, the next ones are being copied, across the borders of rows
too. Pages that are not valid are neither copied nor waited for.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import finish, product
from pallas_kernels.operands import attention_operands
from pallas_kernels.reference import LOWEST
from pallas_kernels.spans import join_spans

TILE = 128  # tokens attended at a time, or one unit where that is more
SLOTS = 6  # tiles in flight, with one being attended
LANES = 128
SUBLANES = 8
SCALAR_BYTES = 2**18  # of scalar memory for the lists of pages, in one call


class RingPlan(NamedTuple):
    """Sizes that the kernel is compiled for: tokens of a page, pages of a tile, tiles of a row, rows of each core, K.

    `at` is the first row of this call, and `scale` the factor on the logits.
    """

    unit: int
    width: int
    tiles: int
    rows: int
    heads: int
    at: int
    scale: float


def masked_topk_decode_attention(
    q, k, v, indices, valid, *, unit, new_k, new_v, lengths, first, spans, scale, layer, return_residual, interpret
):
    """[B, H, D], and the log-sum-exp [B, H] on request. Arguments as in `api.py`; unit >= 16 and S is whole units."""
    heads, n = indices.shape[1:]
    operands = attention_operands(q, k, v, indices, valid, lengths=lengths, first=first, layer=layer)
    base, pages, bounds, queries, *caches = operands
    rows, group = queries.shape[:2]
    pages = jnp.where(pages < k.shape[-2] // unit, pages, -1)
    queries = jnp.pad(queries, ((0, 0), (0, -group % SUBLANES), (0, 0))).astype(k.dtype)

    most = max(1, SCALAR_BYTES // (4 * (-(-n // LANES) * LANES)))  # rows whose lists fit, with their padding
    found = []
    for at in range(0, rows, most):
        part = slice(at, min(at + most, rows))
        call = functools.partial(_attend, unit=unit, scale=scale, heads=heads, interpret=interpret)
        found.append(call(base + at, pages[part], bounds, queries[part], *caches, at=at))
    parts = [jnp.concatenate(a) if len(found) > 1 else a[0] for a in zip(*found, strict=True)]
    top, total, out = (a[:, :group] for a in parts)
    parts = join_spans((top[..., 0], total[..., 0], out), q, spans, layer, scale=scale)
    return finish(parts, q, new_k, new_v, scale, return_residual)


def _attend(base, pages, bounds, queries, k, v, *, unit, scale, heads, at, interpret):
    """(largest logit, sum of weights [rows, G, 128], weighted values [rows, G, D]) of some rows, all float32."""
    rows, group, dim = queries.shape
    n = pages.shape[1]
    width = max(1, TILE // unit)  # pages a tile
    pages = jnp.pad(pages, ((0, 0), (0, -n % width)), constant_values=-1)
    tiles = pages.shape[1] // width
    cores = 2 if rows % 2 == 0 else 1  # for chips with two cores; others run both parts in turn
    plan = RingPlan(unit, width, tiles, rows // cores, heads, at, scale)
    row = lambda core, i, *_: (core * (rows // cores) + i, 0, 0)  # noqa: E731
    tile = pltpu.VMEM((SLOTS, width * unit, dim), k.dtype)
    stats = jax.ShapeDtypeStruct((rows, group, LANES), jnp.float32)
    bytes_read = 2 * pages.size * unit * dim * k.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, rows // cores),
            in_specs=[
                pl.BlockSpec((1, group, dim), row),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec((1, group, LANES), row),
                pl.BlockSpec((1, group, LANES), row),
                pl.BlockSpec((1, group, dim), row),
            ],
            scratch_shapes=[tile, tile, pltpu.SemaphoreType.DMA((SLOTS, 2))],
        ),
        out_shape=[stats, stats, jax.ShapeDtypeStruct((rows, group, dim), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * pages.size * unit * group * dim,
            transcendentals=pages.size * unit * group,
            bytes_accessed=bytes_read,
        ),
        interpret=interpret,
        name="attend_to_pages",
    )(base, pages, bounds, queries, k, v)


def _kernel(
    base_ref, pages_ref, bounds_ref, q_ref, k_hbm, v_hbm, top_ref, total_ref, out_ref, k_vmem, v_vmem, arrived, *, plan
):
    unit, width, tiles, rows, heads, at, scale = plan
    core, row = pl.program_id(0), pl.program_id(1)
    last = rows * tiles  # steps of this core

    def each_copy(step, act):
        """Call act on every copy of a valid page of tile `step`, counted over all rows of this core."""
        own, tile = core * rows + step // tiles, step % tiles
        slot = step % SLOTS
        for u in range(width):
            page = pages_ref[own, tile * width + u]

            @pl.when(page >= 0)
            def _(page=page, u=u):
                source = base_ref[0] + own
                for which, (hbm, vmem) in enumerate(((k_hbm, k_vmem), (v_hbm, v_vmem))):
                    rows_read = hbm.at[source, pl.ds(pl.multiple_of(page * unit, unit), unit), :]
                    written = vmem.at[slot, pl.ds(u * unit, unit), :]
                    act(pltpu.make_async_copy(rows_read, written, arrived.at[slot, which]))

    def start(step):
        @pl.when(step < last)
        def _():
            each_copy(step, lambda copy: copy.start())

    @pl.when(row == 0)
    def _():
        for step in range(SLOTS - 1):
            start(jnp.int32(step))

    own = core * rows + row
    begin, end = bounds_ref[(at + own) // heads, 0], bounds_ref[(at + own) // heads, 1]
    queries = q_ref[0]
    group, dim = queries.shape

    def attended(tile, shape, axis):
        """Which tokens of the tile are attended, as bool of this shape with the tokens along axis."""
        token = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        position = jnp.full(shape, -1, jnp.int32)
        for u in range(width):
            page = pages_ref[own, tile * width + u]
            inside = (token >= u * unit) & (token < (u + 1) * unit) & (page >= 0)
            position = jnp.where(inside, page * unit + token - u * unit, position)
        return (position >= jnp.maximum(begin, 0)) & (position < end)

    def attend(tile, carry):
        top, total, out = carry
        step = row * tiles + tile
        start(step + SLOTS - 1)
        each_copy(step, lambda copy: copy.wait())
        slot = step % SLOTS
        keys, values = k_vmem[slot], v_vmem[slot]
        tokens = width * unit
        logits = product(queries, keys, (1, 1))
        logits = jnp.where(attended(tile, (group, tokens), 1), logits * np.float32(scale), -jnp.inf)
        values = jnp.where(attended(tile, (tokens, dim), 0), values.astype(jnp.float32), 0.0).astype(values.dtype)
        higher = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - higher)
        kept = jnp.exp(top - higher)
        total = total * kept + jnp.sum(weights, axis=1, keepdims=True)
        out = out * kept + product(weights.astype(values.dtype), values)
        return higher, total, out

    nothing, zero = (jnp.full((group, 1), value, jnp.float32) for value in (LOWEST, 0.0))
    empty = nothing, zero, jnp.zeros((group, dim), jnp.float32)
    top, total, out = jax.lax.fori_loop(0, tiles, attend, empty)
    top_ref[0] = jnp.broadcast_to(top, (group, LANES))
    total_ref[0] = jnp.broadcast_to(total, (group, LANES))
    out_ref[0] = out
