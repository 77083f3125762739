"""Attention over chosen pages on TPU. Asynchronous copies bring the pages to VMEM, where they are attended in tiles.

VMEM holds a ring of SLOTS tiles. While one tile is attended, the next ones are being copied, across the borders of rows
too. Pages that are not valid are neither copied nor waited for. A row sees every token of most tiles. These need no
mask, and one wait for each semaphore.
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
from pallas_kernels.reference import LOWEST
from pallas_kernels.spans import join_spans
from pallas_kernels.tpu.operands import attention_operands
from pallas_kernels.tpu.registers import LANES, SUBLANES

TILE = 512  # tokens attended at a time, or one unit where that is more
SLOTS = 4  # tiles in flight, with one being attended; a power of two
UNROLLED = 32  # pages whose copies are started one after another; a longer list is started in a loop of these
SCALAR_BYTES = 2**18  # of scalar memory for the lists of pages, in one call
NOTHING, PART, PAGES, WHOLE = 0, 1, 2, 3  # what a row sees of a tile: some pages, something of each, or all tokens


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
    """[B, H, D], and the log-sum-exp [B, H] on request. Arguments as in `api.py`; `checks.tpu_can` holds."""
    heads = indices.shape[1]
    operands = attention_operands(q, k, v, indices, valid, lengths=lengths, first=first, layer=layer)
    base, pages, bounds, queries, *caches = operands
    rows, group = queries.shape[:2]
    pages, kinds = _tiles(pages, bounds, k.shape[-2], unit, heads)
    queries = jnp.pad(queries, ((0, 0), (0, -group % SUBLANES), (0, 0))).astype(k.dtype)

    most = max(1, SCALAR_BYTES // (4 * (-(-pages.shape[1] // LANES) + 1) * LANES))  # rows whose lists fit
    found = []
    for at in range(0, rows, most):
        part = slice(at, min(at + most, rows))
        call = functools.partial(_attend, unit=unit, scale=scale, heads=heads, interpret=interpret)
        found.append(call(base + at, pages[part], kinds[part], bounds, queries[part], *caches, at=at))
    parts = [jnp.concatenate(a) if len(found) > 1 else a[0] for a in zip(*found, strict=True)]
    top, total, out = (a[:, :group] for a in parts)
    parts = join_spans((top[..., 0], total[..., 0], out), q, spans, layer, scale=scale)
    return finish(parts, q, new_k, new_v, scale, return_residual)


def _tiles(pages, bounds, size, unit, heads):
    """The pages of every row in whole tiles, -1 for those not seen, and the kind of every tile, int32 [rows, tiles]."""
    rows, n = pages.shape
    tokens = max(LANES, unit << max(n - 1, 0).bit_length())  # all of a row's in powers of two
    width = max(1, min(TILE, tokens) // unit)
    pages = jnp.pad(pages, ((0, 0), (0, -n % width)), constant_values=-1)
    ends = jnp.broadcast_to(bounds[:, None], (rows // heads, heads, 2)).reshape(rows, 2)
    begin, end, start = ends[:, :1], ends[:, 1:], pages * unit
    seen = (pages >= 0) & (pages < size // unit) & (start < end) & (start + unit > begin)
    whole = seen & (start >= begin) & (start + unit <= end)
    tile_of = np.arange(pages.shape[1])[:, None] // width == np.arange(pages.shape[1] // width)[None]

    def number(mask):
        """How many pages of each tile are in a mask. The product with ones and zeros is exact."""
        return product(mask.astype(jnp.bfloat16), jnp.asarray(tile_of, jnp.bfloat16))

    held = number(seen)
    kinds = jnp.where(held > 0, PART, NOTHING)
    kinds = jnp.where(held == width, jnp.where(number(whole) == width, WHOLE, PAGES), kinds)
    return jnp.where(seen, pages, -1), kinds


def _attend(base, pages, kinds, bounds, queries, k, v, *, unit, scale, heads, at, interpret):
    """(largest logit, sum of weights [rows, G, 128], weighted values [rows, G, D]) of some rows, all float32."""
    rows, group, dim = queries.shape
    tiles, width = kinds.shape[1], pages.shape[1] // kinds.shape[1]
    cores = 2 if rows % 2 == 0 else 1  # for chips with two cores; others run both parts in turn
    plan = RingPlan(unit, width, tiles, rows // cores, heads, at, scale)
    row = lambda core, i, *_: (core * (rows // cores) + i, 0, 0)  # noqa: E731
    tile = pltpu.VMEM((SLOTS, width * unit, dim), k.dtype)
    stats = jax.ShapeDtypeStruct((rows, group, LANES), jnp.float32)
    bytes_read = 2 * pages.size * unit * dim * k.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,  # `_tiles` leaves no page beyond the cache
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pages.size * unit * group * dim,
            transcendentals=pages.size * unit * group,
            bytes_accessed=bytes_read,
        ),
        interpret=interpret,
        name="attend_to_pages",
    )(base, pages.reshape(-1), kinds, bounds, queries, k, v)


def _kernel(base_ref, pages_ref, kinds_ref, bounds_ref, q_ref, k_hbm, v_hbm, *outputs, plan):
    unit, width, tiles, rows, heads, at, scale = plan
    top_ref, total_ref, out_ref, k_vmem, v_vmem, arrived = outputs
    core, row = pl.program_id(0), pl.program_id(1)
    last = rows * tiles  # tiles of this core
    rings = ((k_hbm, k_vmem), (v_hbm, v_vmem))

    def place_of(step):
        """The row, the tile and the slot of the ring of tile `step`, counted over all rows of this core."""
        own = jax.lax.div(step, tiles)
        return core * rows + own, step - own * tiles, jax.lax.bitwise_and(step, SLOTS - 1)

    def page_of(place, u):
        """Page u of a tile."""
        own, tile, _ = place
        return pages_ref[(own * tiles + tile) * width + u]

    def copies(place, first, u=0, of=1):
        """The two copies of page first + u of a tile, of `of` pages from the first on, and whether the row sees it."""
        own, _, slot = place
        page = page_of(place, first + u)
        start = pl.ds(pl.multiple_of(page * unit, unit), unit)
        at = first * unit if isinstance(first, int) else pl.multiple_of(first * unit, of * unit)
        part, inside = pl.ds(at, of * unit), pl.ds(u * unit, unit)
        both = [
            pltpu.make_async_copy(
                hbm.at[base_ref[0] + own, start, :],
                vmem.at[slot, part, :].at[inside, :],
                arrived.at[slot, which],
            )
            for which, (hbm, vmem) in enumerate(rings)
        ]
        return both, page >= 0

    def each_copy(place, act):
        """Call act on every copy of a tile of which the row sees a part."""

        def one(u, carry):
            both, seen = copies(place, u)

            @pl.when(seen)
            def _():
                for copy in both:
                    act(copy)

            return carry

        jax.lax.fori_loop(0, width, one, 0)

    def start_all(place):
        """Start every copy of a tile."""

        of = min(width, UNROLLED)

        def some(part, carry):
            for u in range(of):
                for copy in copies(place, part * of, u, of)[0]:
                    copy.start()
            return carry

        if of == width:
            some(0, 0)
        else:
            jax.lax.fori_loop(0, width // of, some, 0)

    def start(step):
        place = place_of(jnp.minimum(step, last - 1))
        kind = jnp.where(step < last, kinds_ref[place[0], place[1]], NOTHING)

        @pl.when(kind >= PAGES)
        def _():
            start_all(place)

        @pl.when(kind == PART)
        def _():
            each_copy(place, lambda copy: copy.start())

    def wait(place, kind):
        slot = place[2]

        @pl.when(kind >= PAGES)
        def _():
            for which, (_, vmem) in enumerate(rings):
                pltpu.make_async_copy(vmem.at[slot], vmem.at[slot], arrived.at[slot, which]).wait()  # for all its bytes

        @pl.when(kind == PART)
        def _():
            each_copy(place, lambda copy: copy.wait())

    def start_first(step, carry):
        start(step)
        return carry

    @pl.when(row == 0)
    def _():
        jax.lax.fori_loop(0, SLOTS - 1, start_first, 0)

    sequence = jax.lax.div(at + core * rows + row, heads)
    begin, end = bounds_ref[sequence, 0], bounds_ref[sequence, 1]
    queries = q_ref[0]
    group, dim = queries.shape

    def seen_tokens(place):
        """1 for the tokens of a tile that the row sees and 0 for others, [tokens, 128]."""
        together = max(SUBLANES // unit, 1)  # pages of a part, which has whole registers
        token = jax.lax.broadcasted_iota(jnp.int32, (together * unit, LANES), 0)
        parts = []
        for u in range(0, width, together):
            page = page_of(place, u)
            for more in range(1, together):
                page = jnp.where(token < more * unit, page, page_of(place, u + more))
            position = page * unit + jax.lax.bitwise_and(token, unit - 1)  # below 0, and so not seen, without a page
            parts.append(((position >= begin) & (position < end)).astype(jnp.float32))
        return jnp.concatenate(parts)

    def add(place, carry, masked):
        """The sums with those of a tile."""
        top, total, out = carry
        keys, values = k_vmem[place[2]], v_vmem[place[2]]
        logits = product(queries, keys, (1, 1)) * np.float32(scale)
        if masked:
            seen = seen_tokens(place)
            across = product(jnp.ones((group, LANES), jnp.bfloat16), seen.astype(jnp.bfloat16), (1, 1))
            logits = jnp.where(across > 0, logits, -jnp.inf)
            seen = jnp.broadcast_to(seen[:, :1], values.shape) > 0
            values = jnp.where(seen, values.astype(jnp.float32), 0.0).astype(values.dtype)
        higher = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - higher)
        kept = jnp.exp(top - higher)
        total = total * kept + jnp.sum(weights, axis=1, keepdims=True)
        out = out * kept + product(weights.astype(values.dtype), values)
        return higher, total, out

    def attend(tile, carry):
        step = row * tiles + tile
        start(step + SLOTS - 1)
        place = place_of(step)
        kind = kinds_ref[place[0], place[1]]
        wait(place, kind)

        def part():
            return jax.lax.cond(kind == NOTHING, lambda: carry, lambda: add(place, carry, True))

        return jax.lax.cond(kind == WHOLE, lambda: add(place, carry, False), part)

    nothing, zero = (jnp.full((group, 1), value, jnp.float32) for value in (LOWEST, 0.0))
    empty = nothing, zero, jnp.zeros((group, dim), jnp.float32)
    top, total, out = jax.lax.fori_loop(0, tiles, attend, empty)
    top_ref[0] = jnp.broadcast_to(top, (group, LANES))
    total_ref[0] = jnp.broadcast_to(total, (group, LANES))
    out_ref[0] = out
