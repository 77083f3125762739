"""The GPU kernels, through Pallas' Triton lowering: token-granular, since array-indexed loads gather single rows.

The only file that knows Triton. The chosen tokens of a row are split over programs so that rows times splits fill the
chip; the splits, and the current token, merge by their log-sum-exp. Triton's blocks are powers of two, and its products
at least 16 on every side: query heads and widths are padded, and what is padded is masked on load.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.reference import wanted
from pallas_kernels.xla import LOWEST, exact, finish, taken_off, total_of
from pallas_kernels.xla_select import BARRED, candidates, token_image, unit_image

PROGRAMS = 528  # to have at work: four for each of 132 multiprocessors
TOKENS = 64  # attended at a time
SCORES = 512  # tokens scored by one program
UNITS = 2048  # units compared at a time by the selection
LEAST = 16  # the smallest side of a product


def _power(number):
    """The smallest power of two that a product takes and that is not below number."""
    return max(LEAST, 1 << (number - 1).bit_length())


def _call(kernel, *, grid, out_shape, warps, interpret, name):
    """A Triton kernel over whole arrays: every operand is a reference to all of it."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=name,
    )


def _bounds(lengths, first):
    """int32 [B, 2]: the first token that a row sees and the end of them."""
    start = jnp.zeros(lengths.shape, jnp.int32) if first is None else jnp.maximum(first.astype(jnp.int32), 0)
    return jnp.stack([start, lengths.astype(jnp.int32)], axis=1)


def _layer(layer):
    return jnp.zeros((1,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)


# --- scores ---------------------------------------------------------------------------------------


def importance_scores(q_imp, k_imp, lengths, *, pooling, totals, interpret, **options):
    """float32 [B, K, S]; arguments as in `api.py`."""
    batch, heads, group, _ = q_imp.shape
    size, key_heads = k_imp.shape[-1], k_imp.shape[-3]
    if size == 0:
        return jnp.zeros((batch, heads, 0), jnp.float32)
    call, operands, static = _over_blocks(q_imp, k_imp, lengths, interpret, **options)
    rows, padded = operands[2].shape[:2]
    total = jnp.zeros((rows, padded), jnp.float32)
    if pooling == "normalised" and group > 1:
        if totals is None:
            totals = importance_totals(q_imp, k_imp, lengths, interpret=interpret, **options)
        totals = taken_off(totals).reshape(rows, static["group"])
        total = jnp.pad(totals.astype(jnp.float32), ((0, 0), (0, padded - static["group"])))
    kernel = functools.partial(_scores_kernel, **static)
    out_shape = jax.ShapeDtypeStruct((rows, size), jnp.float32)
    scores = call(kernel, out_shape=out_shape, name="importance_scores")(*operands, total)
    return jnp.max(scores.reshape(batch, heads, key_heads // heads, size), axis=2)


def importance_totals(q_imp, k_imp, lengths, *, interpret, **options):
    """float32 [B, K, G]; arguments as in `api.py`."""
    if k_imp.shape[-1] == 0:
        return jnp.full(q_imp.shape[:3], -jnp.inf)
    call, operands, static = _over_blocks(q_imp, k_imp, lengths, interpret, **options)
    rows, padded = operands[2].shape[:2]
    stats = jax.ShapeDtypeStruct((rows, pl.cdiv(static["size"], SCORES), padded), jnp.float32)
    kernel = functools.partial(_lse_kernel, **static)
    tops, sums = call(kernel, out_shape=[stats, stats], name="importance_totals")(*operands)
    top = jnp.max(tops, axis=1)
    held = jnp.sum(sums * jnp.exp(tops - top[:, None]), axis=1)
    return total_of(top, held)[:, : static["group"]].reshape(q_imp.shape[:3])


def _over_blocks(q_imp, k_imp, lengths, interpret, *, scales, scale, first, layer):
    """What kernels over blocks of score keys share: their call, their operands, and what is static of them."""
    batch, _, _, rank = q_imp.shape
    size, key_heads = k_imp.shape[-1], k_imp.shape[-3]
    factor = jnp.full((batch, key_heads), scale, jnp.float32)
    if scales is not None:
        factor = factor * jnp.broadcast_to(scales, factor.shape).astype(jnp.float32)
    queries = q_imp.reshape(batch * key_heads, -1, rank)
    members = queries.shape[1]
    padding = ((0, 0), (0, _power(members) - members), (0, _power(rank) - rank))
    queries = jnp.pad(queries, padding)
    keys = k_imp.reshape(-1, rank, size)
    rows, blocks = queries.shape[0], pl.cdiv(size, SCORES)
    operands = (_layer(layer) * rows, _bounds(lengths, first), queries, factor.reshape(rows), keys)
    static = dict(group=members, rank=rank, size=size, heads=key_heads)
    return functools.partial(_call, grid=(rows, blocks), warps=4, interpret=interpret), operands, static


def _block_scores(base_ref, bounds_ref, q_ref, factor_ref, keys_ref, *, group, rank, size, heads):
    """(positions [C], float32 scores [G, C]) of this program's block; -inf for padding, tokens not seen, and NaN."""
    row, block = pl.program_id(0), pl.program_id(1)
    begin, end = bounds_ref[row // heads, 0], bounds_ref[row // heads, 1]
    queries = q_ref[row]
    padded, width = queries.shape
    position = block * SCORES + jnp.arange(SCORES, dtype=jnp.int32)
    part = jnp.arange(width, dtype=jnp.int32)
    inside = jnp.broadcast_to((position < size)[None, :], (width, SCORES)) & (part < rank)[:, None]
    at = (jnp.broadcast_to(part[:, None], inside.shape), jnp.broadcast_to(position[None, :], inside.shape))
    keys = plgpu.load(keys_ref.at[base_ref[0] + row, *at], mask=inside, other=0)
    kind = keys.dtype if keys.dtype == queries.dtype else jnp.float32
    if keys.dtype == jnp.int8:
        kind = queries.dtype  # bfloat16 holds every int8
    scores = jax.lax.dot_general(
        queries.astype(kind), keys.astype(kind), (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32, precision=exact(kind),
    )  # fmt: skip
    seen = ((position >= begin) & (position < end))[None, :]
    seen = jnp.broadcast_to(seen, scores.shape) & (jnp.arange(padded, dtype=jnp.int32) < group)[:, None]
    scores = scores * factor_ref[row]
    return position, jnp.where(seen & (scores == scores), scores, -jnp.inf)


def _lse_kernel(base_ref, bounds_ref, q_ref, factor_ref, keys_ref, top_ref, total_ref, **static):
    _, scores = _block_scores(base_ref, bounds_ref, q_ref, factor_ref, keys_ref, **static)
    top = jnp.maximum(jnp.max(scores, axis=1), LOWEST)
    row, block = pl.program_id(0), pl.program_id(1)
    top_ref[row, block] = top
    total_ref[row, block] = jnp.sum(jnp.exp(scores - top[:, None]), axis=1)


def _scores_kernel(base_ref, bounds_ref, q_ref, factor_ref, keys_ref, lse_ref, out_ref, **static):
    position, scores = _block_scores(base_ref, bounds_ref, q_ref, factor_ref, keys_ref, **static)
    row = pl.program_id(0)
    best = jnp.max(scores - lse_ref[row][:, None], axis=0)
    plgpu.store(out_ref.at[row, position], best, mask=position < static["size"])


# --- selection ------------------------------------------------------------------------------------


def select_top_k(scores, lengths, n, *, counts, sinks, recent, unit, first, threshold, interpret):
    """(indices, valid) [B, K, n]; arguments as in `api.py`."""
    batch, heads, size = scores.shape
    if n == 0 or size == 0:
        return jnp.zeros((batch, heads, n), jnp.int32), jnp.zeros((batch, heads, n), bool)
    image = token_image(scores, lengths, sinks=sinks, recent=recent, first=first, threshold=threshold)
    image = unit_image(image, unit)
    taken = jnp.minimum(candidates(image, size, lengths, unit, first, threshold), wanted(counts, n, (batch, heads)))
    rows, units = batch * heads, image.shape[-1]
    block = min(UNITS, _power(units))
    image = jnp.pad(image.reshape(rows, units), ((0, 0), (0, -units % block)), constant_values=BARRED)
    indices = _call(
        functools.partial(_select_kernel, blocks=image.shape[1] // block, block=block),
        grid=(rows,), out_shape=jax.ShapeDtypeStruct((rows, n + 1), jnp.int32), warps=8, interpret=interpret,
        name="select_top_k",
    )(image, taken.reshape(rows))[:, :n].reshape(batch, heads, n)  # fmt: skip
    valid = jnp.arange(n, dtype=jnp.int32)[None, None] < taken[..., None]
    return jnp.where(valid, indices, 0), valid


def _select_kernel(image_ref, target_ref, out_ref, *, blocks, block):
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

    def narrow(step, found):  # two bits of the threshold at a time, from the top, as an unsigned number
        low = jnp.int32(30) - 2 * step
        trials = tuple(found | jax.lax.shift_left(jnp.int32(bits), low) for bits in (1, 2, 3))
        for trial, reached in zip(trials, count(*(trial ^ BARRED for trial in trials)), strict=True):
            found = jnp.where(reached >= target, trial, found)
        return found

    limit = jax.lax.fori_loop(0, 16, narrow, jnp.int32(0)) ^ BARRED

    def above(i, total):
        return total + jnp.sum((part(i) > limit).astype(jnp.int32))

    missing = target - jax.lax.fori_loop(0, blocks, above, jnp.int32(0))  # how many of those that equal it

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
        last = out_ref.shape[1] - 1  # of no use to the caller: what is not kept points there, at no slot of the list
        plgpu.store(out_ref.at[row, jnp.where(kept, place, last)], position, mask=kept)
        return slot + jnp.sum(number), ties + jnp.sum(equal)

    jax.lax.fori_loop(0, blocks, write, (jnp.int32(0), jnp.int32(0)))


# --- attention ------------------------------------------------------------------------------------


def masked_topk_decode_attention(
    q, k, v, indices, valid, *, unit, new_k, new_v, lengths, first, scale, layer, return_residual, interpret
):
    """[B, H, D], and the log-sum-exp [B, H] on request; arguments as in `api.py`."""
    batch, heads, n = indices.shape
    dim, size = q.shape[-1], k.shape[-2]
    rows, group = batch * heads, q.shape[1] // heads
    if n == 0 or size == 0:
        empty = jnp.full((rows, group), LOWEST)
        parts = empty, jnp.zeros((rows, group)), jnp.zeros((rows, group, dim))
        return finish(parts, q, new_k, new_v, scale, return_residual)
    lengths = jnp.full((batch,), size, jnp.int32) if lengths is None else jnp.minimum(lengths, size)
    units = (indices if valid is None else jnp.where(valid, indices, -1)).reshape(rows, n)
    queries = q.reshape(rows, group, dim).astype(k.dtype)
    queries = jnp.pad(queries, ((0, 0), (0, _power(group) - group), (0, _power(dim) - dim)))
    padded, width = queries.shape[1:]
    blocks = pl.cdiv(n * unit, TOKENS)
    splits = max(1, min(blocks, PROGRAMS // rows))
    share = pl.cdiv(blocks, splits)  # blocks a program
    stats = jax.ShapeDtypeStruct((rows, splits, padded), jnp.float32)
    kernel = functools.partial(_attend_kernel, unit=unit, n=n, share=share, dim=dim, heads=heads, scale=scale)
    top, total, out = _call(
        kernel, grid=(rows, splits), warps=4, interpret=interpret, name="attend_to_tokens",
        out_shape=[stats, stats, jax.ShapeDtypeStruct((rows, splits, padded, width), jnp.float32)],
    )(_layer(layer) * rows, units, _bounds(lengths, first), queries,
      k.reshape(-1, size, dim), v.reshape(-1, size, dim))  # fmt: skip
    highest = jnp.max(top, axis=1)
    kept = jnp.exp(top - highest[:, None])
    parts = highest, jnp.sum(total * kept, axis=1), jnp.sum(out * kept[..., None], axis=1)
    top, total, out = (part[:, :group] for part in parts)
    return finish((top, total, out[..., :dim]), q, new_k, new_v, scale, return_residual)


def _attend_kernel(
    base_ref, units_ref, bounds_ref, q_ref, k_ref, v_ref, top_ref, total_ref, out_ref,
    *, unit, n, share, dim, heads, scale,
):  # fmt: skip
    row, split = pl.program_id(0), pl.program_id(1)
    begin, end = bounds_ref[row // heads, 0], bounds_ref[row // heads, 1]
    source = base_ref[0] + row
    queries = q_ref[row]
    padded, width = queries.shape
    column = jnp.arange(width, dtype=jnp.int32)
    precision = exact(queries.dtype)

    def attend(i, carry):
        top, total, out = carry
        slot = (split * share + i) * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
        listed = slot < n * unit
        chosen = plgpu.load(units_ref.at[row, slot // unit], mask=listed, other=-1)
        position = chosen * unit + slot % unit
        seen = listed & (chosen >= 0) & (position >= begin) & (position < end)
        position = jnp.where(seen, position, 0)
        shape = (TOKENS, width)
        inside = jnp.broadcast_to(seen[:, None], shape) & (column < dim)[None, :]
        at = (source, jnp.broadcast_to(position[:, None], shape), jnp.broadcast_to(column[None, :], shape))
        keys = plgpu.load(k_ref.at[at], mask=inside, other=0)
        values = plgpu.load(v_ref.at[at], mask=inside, other=0)
        logits = jax.lax.dot_general(
            queries, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision
        )
        logits = jnp.where(seen[None, :], logits * np.float32(scale), -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - higher[:, None])
        kept = jnp.exp(top - higher)
        added = jax.lax.dot_general(
            weights.astype(values.dtype), values, (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32, precision=precision,
        )  # fmt: skip
        return higher, total * kept + jnp.sum(weights, axis=1), out * kept[:, None] + added

    empty = (
        jnp.full((padded,), LOWEST, jnp.float32), jnp.zeros((padded,), jnp.float32),
        jnp.zeros((padded, width), jnp.float32),
    )  # fmt: skip
    top, total, out = jax.lax.fori_loop(0, share, attend, empty)
    top_ref[row, split] = top
    total_ref[row, split] = total
    out_ref[row, split] = out
