"""Importance scores on TPU: score keys are read once, in blocks as wide as fit, and pooled on the way out.

"normalised" pooling needs every head's log-sum-exp before the first score is written, so a row of blocks is passed
twice. Where one block holds all of a head's keys, as it does up to LONGEST bytes of them, the second pass finds it in
VMEM and nothing is read twice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.xla import LOWEST, exact, taken_off, total_of

LONGEST = 2**22  # bytes of score keys in one block
SUBLANES = 8
LANES = 128
VMEM_BYTES = 48 * 2**20


def importance_scores(q_imp, k_imp, lengths, *, pooling, totals, interpret, **options):
    """float32 [B, K, S]; arguments as in `api.py`."""
    batch, heads, group, _ = q_imp.shape
    size, key_heads = k_imp.shape[-1], k_imp.shape[-3]
    if size == 0:
        return jnp.zeros((batch, heads, 0), jnp.float32)
    operands = _operands(q_imp, k_imp, lengths, **options)
    normalised = pooling == "normalised" and group > 1
    given = totals if normalised else None
    scores = _over_blocks(
        *operands, given, key_heads, counts=normalised and given is None, writes=True, interpret=interpret
    )
    return jnp.max(scores.reshape(batch, heads, key_heads // heads, size), axis=2)


def importance_totals(q_imp, k_imp, lengths, *, interpret, **options):
    """float32 [B, K, G]; arguments as in `api.py`."""
    if k_imp.shape[-1] == 0:
        return jnp.full(q_imp.shape[:3], -jnp.inf)
    operands = _operands(q_imp, k_imp, lengths, **options)
    members = operands[2].shape[1]
    totals = _over_blocks(*operands, None, k_imp.shape[-3], counts=True, writes=False, interpret=interpret)
    return totals[:, :members, 0].reshape(q_imp.shape[:3])


def _operands(q_imp, k_imp, lengths, *, scales, scale, first, layer):
    """The rows of a layer in the cache, what they see, and queries, factors and keys a row."""
    batch, key_heads = q_imp.shape[0], k_imp.shape[-3]
    factor = jnp.full((batch, key_heads), scale, jnp.float32)
    if scales is not None:
        factor = factor * jnp.broadcast_to(scales, factor.shape).astype(jnp.float32)
    start = jnp.zeros((batch,), jnp.int32) if first is None else first.astype(jnp.int32)
    bounds = jnp.stack([start, lengths.astype(jnp.int32)], axis=1)
    layer = jnp.zeros((1,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
    queries = q_imp.reshape(batch * key_heads, -1, q_imp.shape[-1])
    keys = k_imp.reshape(-1, *k_imp.shape[-2:])
    return layer * batch * key_heads, bounds, queries, factor.reshape(-1, 1, 1), keys


def _block(size, bytes_a_token):
    """Tokens in a block: all of them, or the largest power of two of lanes that fits."""
    if size * bytes_a_token <= LONGEST or size <= LANES:
        return size
    return max(LANES, 1 << ((LONGEST // bytes_a_token).bit_length() - 1))


def _over_blocks(base, bounds, queries, factor, keys, given, heads, *, counts, writes, interpret):
    """Scores [rows, 1, S] of queries [rows, G, R] and keys [layers*rows, R, S], pooled over G; float32.

    counts: the log-sum-exps are found first. writes: they, or those given, are taken off; else they are the result,
    [rows, G rounded up, 128].
    """
    rows, group, rank = queries.shape
    size = keys.shape[-1]
    padding = ((0, 0), (0, -group % SUBLANES), (0, 0))
    queries = jnp.pad(queries, padding)
    padded = queries.shape[1]
    given = jnp.zeros((rows, group, 1)) if given is None else given
    given = jnp.pad(given.astype(jnp.float32).reshape(rows, group, 1), padding)
    block = _block(size, rank * keys.dtype.itemsize)
    blocks = pl.cdiv(size, block)
    passes = counts + writes
    chunk = next((c for c in (2048, 1024, 512, 256, 128) if block % c == 0), block)
    kernel = functools.partial(
        _kernel, group=group, block=block, chunk=chunk, heads=heads, counts=counts, writes=writes, blocks=blocks
    )
    whole = lambda row, p, n, *_: (row, 0, 0)  # noqa: E731
    out = jax.ShapeDtypeStruct((rows, 1, size) if writes else (rows, padded, LANES), jnp.float32)
    place = pl.BlockSpec((1, 1, block), lambda row, p, n, *_: (row, 0, n * p if passes > 1 else n))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, passes, blocks),
            in_specs=[
                pl.BlockSpec((1, padded, rank), whole),
                pl.BlockSpec((1, 1, 1), whole),
                pl.BlockSpec((1, padded, 1), whole),
                pl.BlockSpec((1, rank, block), lambda row, p, n, base, bounds: (base[0] + row, 0, n)),
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
            bytes_accessed=rows * size * (rank * keys.dtype.itemsize + 4),
        ),
        interpret=interpret,
        name="importance_scores" if writes else "importance_totals",
    )(base, bounds, queries, factor, given, keys)


def _kernel(
    base_ref, bounds_ref, q_ref, factor_ref, given_ref, keys_ref, out_ref, top_ref, total_ref,
    *, group, block, chunk, heads, counts, writes, blocks,
):  # fmt: skip
    del base_ref  # the index map of the keys has used it
    row, phase, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    begin, end = bounds_ref[row // heads, 0], bounds_ref[row // heads, 1]
    queries = q_ref[0]
    padded = queries.shape[0]
    factor = factor_ref[0]  # [1, 1]

    def scores(at):
        """float32 [G, chunk], -inf for padding heads, tokens that are not seen, and NaN."""
        keys = keys_ref[0, :, pl.ds(at, chunk)]
        kind = keys.dtype if keys.dtype == queries.dtype else jnp.float32
        if keys.dtype == jnp.int8:
            kind = queries.dtype  # bfloat16 holds every int8
            keys = keys.astype(jnp.float32)
        keys, own = keys.astype(kind), queries.astype(kind)
        found = jax.lax.dot_general(
            own, keys, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32, precision=exact(kind)
        )
        found = found * jnp.broadcast_to(factor, found.shape)
        position = index * block + at + jax.lax.broadcasted_iota(jnp.int32, (padded, chunk), 1)
        head = jax.lax.broadcasted_iota(jnp.int32, (padded, chunk), 0)
        seen = (position >= begin) & (position < end) & (head < group)
        return jnp.where(seen & (found == found), found, -jnp.inf)

    def each_chunk(body, carry):
        """body(first token of a chunk, carry) over the block."""
        if chunk == block:
            return body(0, carry)
        return jax.lax.fori_loop(0, block // chunk, lambda i, c: body(pl.multiple_of(i * chunk, chunk), c), carry)

    def totals():
        """float32 [G, 1]: log-sum-exps once everything is counted."""
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
        off = taken_off(totals() if counts else given_ref[0])

        def write(at, carry):
            out_ref[0, :, pl.ds(at, chunk)] = jnp.max(scores(at) - off, axis=0, keepdims=True)
            return carry

        each_chunk(write, 0)
