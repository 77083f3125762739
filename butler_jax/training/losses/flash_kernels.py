"""Kernels of the cross entropy with errors as its target, for TPU: tiles of errors are formed in VMEM and summed there.

A tile [S, C] has S keys in its rows and C queries in its columns. So what belongs to a query is a row [1, C], and sums
over keys are sums over rows of the tile. Importance vectors are [R, T]: R is too narrow for the minor dimension.

`sum_rows` goes through the keys of every block of queries, and `key_gradients` through the queries of every block of
keys. Both form the same errors again: kept, they would be a T x T matrix. `squared_norms` comes before them.

In bfloat16, the products that make errors and scores take bfloat16 factors. W W^T is two such factors, which hold 16
bits, and so is a value or an output times it. So |(v - o) W| is exact to about 2**-9 |v W|.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from butler_jax.model import LOWEST, soft_cap

LANES = 128
VMEM_BYTES = 48 * 2**20


class TilePlan(NamedTuple):
    """What the kernels are compiled for.

    block: queries and keys of a tile, C and S. group: query heads that share a KV head. share: those that share a head
    of k_imp. error: of the rule. softcap: of the attention's logits.
    """

    block: int
    group: int
    share: int
    error: str
    softcap: float | None


class Operands(NamedTuple):
    """The arrays of one device. T is a multiple of LANES, and q, k, q_imp are scaled.

    bounds: the first and the last contested key of each row, and the end of its far keys (`FarKeys`). of_rows: the
    logarithm of how many keys each far key stands for, and |x|. lse: of the attention. own, squares: |o W|^2 and
    |v W|^2 of each query head. q, k, v, output, q_imp and k_imp have one dtype, float32 or bfloat16; the others are
    float32.
    """

    bounds: jax.Array  # int32 [B, 3, T]
    of_rows: jax.Array  # [B, 2, T]
    q: jax.Array  # [B, H, T, D]
    k: jax.Array  # [B, K, T, D]
    v: jax.Array  # [B, K, T, D]
    output: jax.Array  # [B, H, T, D]
    gram: jax.Array  # [H, D, D]
    q_imp: jax.Array  # [B, H, R, T]
    k_imp: jax.Array  # [B, Q, R, T]
    lse: jax.Array  # [B, H, 1, T]
    own: jax.Array  # [B, H, 1, T]
    squares: jax.Array  # [B, H, 1, T]


class RowSums(NamedTuple):
    """What `sum_rows` finds for each row, over its contested keys, every key as often as it counts.

    mass: the summed errors. lse: the log-sum-exp of the scores. cross_entropy: the loss. factor: what makes errors of
    the errors of tiles. dq_imp: the gradient of the scaled q_imp.
    """

    mass: jax.Array  # [B, H, 1, T]
    lse: jax.Array  # [B, H, 1, T]
    cross_entropy: jax.Array  # [B, H, 1, T]
    factor: jax.Array  # [B, H, 1, T]
    dq_imp: jax.Array  # [B, H, R, T]


class GridStep(NamedTuple):
    """What a step of the grid works on: a row, a query head, its KV head and head of k_imp, and two blocks.

    queries: the block of queries. keys: the block of keys.
    """

    row: jax.Array
    head: jax.Array
    kv_head: jax.Array
    key_head: jax.Array
    queries: jax.Array
    keys: jax.Array


def block_size(length: int) -> int:
    """Queries and keys of a tile: the largest size that divides the length, a multiple of LANES."""
    return next(size for size in (512, 256, LANES) if length % size == 0)


def squared_norms(x: jax.Array, gram: jax.Array, block: int, *, interpret: bool) -> jax.Array:
    """|x W|^2 of vectors [B, K, T, D] and every query head, float32 [B, H, 1, T]. gram: [H, D, D], of W W^T."""
    batch, heads, length, dim = x.shape
    group = gram.shape[0] // heads
    return pl.pallas_call(
        _squared_norms,
        grid=(batch, gram.shape[0], length // block),
        in_specs=[
            pl.BlockSpec((1, 1, block, dim), lambda b, h, i: (b, h // group, i, 0)),
            pl.BlockSpec((1, dim, dim), lambda b, h, i: (h, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, 1, 1, block), lambda b, h, i: (b, h, 0, i)),
        out_shape=jax.ShapeDtypeStruct((batch, gram.shape[0], 1, length), jnp.float32),
        compiler_params=_parameters(3),
        interpret=interpret,
        name="squared_norms",
    )(x, gram)


def sum_rows(operands: Operands, plan: TilePlan, *, interpret: bool) -> RowSums:
    """Sums over the contested keys of every row, all float32."""
    batch, heads, rank, length = operands.q_imp.shape
    blocks = length // plan.block

    def place(b, h, i, j, spans):
        return GridStep(b, h, h // plan.group, h // plan.share, i, _nearest(j, spans, b, i))

    stats = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_sum_rows, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, blocks, blocks),
            in_specs=list(_specs(operands, plan, place)),
            out_specs=[
                *[_spec((1, 1, 1, plan.block), place, lambda p: (p.row, p.head, 0, p.queries))] * 4,
                _spec((1, 1, rank, plan.block), place, lambda p: (p.row, p.head, 0, p.queries)),
            ],
            scratch_shapes=[
                _projected(operands, plan),
                *[pltpu.VMEM((1, plan.block), jnp.float32)] * 5,
                *[pltpu.VMEM((rank, plan.block), jnp.float32)] * 2,
            ],
        ),
        out_shape=[*[stats] * 4, jax.ShapeDtypeStruct(operands.q_imp.shape, jnp.float32)],
        compiler_params=_parameters(4),
        cost_estimate=_cost(operands, plan, products=6),
        interpret=interpret,
        name="sum_error_rows",
    )(_spans(operands.bounds, plan.block, of_keys=False), *operands)
    return RowSums(*found)


def key_gradients(operands: Operands, sums: RowSums, plan: TilePlan, *, interpret: bool) -> jax.Array:
    """The gradient of k_imp, float32 [B, Q, R, T]."""
    batch, key_heads, rank, length = operands.k_imp.shape
    blocks = length // plan.block

    def place(b, n, j, m, i, spans):
        head = n * plan.share + m
        return GridStep(b, head, head // plan.group, n, _nearest(i, spans, b, j), j)

    of_keys = _spec((1, 1, rank, plan.block), place, lambda p: (p.row, p.key_head, 0, p.keys))
    of_queries = _spec((1, 1, 1, plan.block), place, lambda p: (p.row, p.head, 0, p.queries))
    return pl.pallas_call(
        functools.partial(_key_gradients, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, key_heads, blocks, plan.share, blocks),
            in_specs=[*_specs(operands, plan, place), *[of_queries] * 3],
            out_specs=of_keys,
            scratch_shapes=[_projected(operands, plan), pltpu.VMEM((rank, plan.block), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(operands.k_imp.shape, jnp.float32),
        compiler_params=_parameters(5),
        cost_estimate=_cost(operands, plan, products=5),
        interpret=interpret,
        name="error_key_gradients",
    )(_spans(operands.bounds, plan.block, of_keys=True), *operands, sums.mass, sums.lse, sums.factor)


def _specs(operands, plan, place):
    """The blocks of the operands that a step of the grid reads."""
    dim, rank, block = operands.q.shape[3], operands.q_imp.shape[2], plan.block
    of_queries = _spec((1, 1, block, dim), place, lambda p: (p.row, p.head, p.queries, 0))
    of_keys = _spec((1, 1, block, dim), place, lambda p: (p.row, p.kv_head, p.keys, 0))
    by_query = _spec((1, 1, 1, block), place, lambda p: (p.row, p.head, 0, p.queries))
    return Operands(
        bounds=_spec((1, 3, block), place, lambda p: (p.row, 0, p.queries)),
        of_rows=_spec((1, 2, block), place, lambda p: (p.row, 0, p.queries)),
        q=of_queries,
        k=of_keys,
        v=of_keys,
        output=of_queries,
        gram=_spec((1, dim, dim), place, lambda p: (p.head, 0, 0)),
        q_imp=_spec((1, 1, rank, block), place, lambda p: (p.row, p.head, 0, p.queries)),
        k_imp=_spec((1, 1, rank, block), place, lambda p: (p.row, p.key_head, 0, p.keys)),
        lse=by_query,
        own=by_query,
        squares=_spec((1, 1, 1, block), place, lambda p: (p.row, p.head, 0, p.keys)),
    )


def _spec(shape, place, index):
    """A block of an operand; index: the place of the block in the operand, from a GridStep."""
    return pl.BlockSpec(shape, lambda *step: index(place(*step)))


def _nearest(number, spans, row, block):
    """The block to hold in VMEM: of the skipped ones, the nearest that is not skipped, so that nothing is copied."""
    return jnp.clip(number, spans[row, 0, block], jnp.maximum(spans[row, 1, block], spans[row, 0, block]))


def _projected(operands, plan):
    """Room for a block of vectors times W W^T, in parts."""
    dtype = operands.v.dtype
    return pltpu.VMEM((1 if dtype == jnp.float32 else 2, plan.block, operands.v.shape[3]), dtype)


def _squared_norms(vectors_ref, gram_ref, out_ref):
    squares = jnp.sum(_project(vectors_ref, gram_ref) * vectors_ref[0, 0].astype(jnp.float32), axis=1, keepdims=True)
    out_ref[0, 0] = jnp.transpose(squares)


def _sum_rows(spans_ref, *refs, plan):
    given = Operands(*refs[: len(Operands._fields)])
    found = RowSums(*refs[len(given) : len(given) + len(RowSums._fields)])
    projected_ref, top_ref, total_ref, sum_ref, added_ref, logs_ref, true_ref, predicted_ref = refs[-8:]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, LOWEST, jnp.float32)
        for ref in (total_ref, sum_ref, added_ref, logs_ref, true_ref, predicted_ref):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)
        if plan.error == "centred":
            _write_parts(_project(given.output, given.gram), projected_ref)

    @pl.when((spans_ref[b, 0, i] <= j) & (j <= spans_ref[b, 1, i]))
    def _():
        outputs = [projected_ref[n] for n in range(projected_ref.shape[0])]
        errors, scores, added, logs = _tiles(given, [given.v[0, 0]], outputs, j * plan.block, plan)
        higher = jnp.maximum(top_ref[...], jnp.max(scores, axis=0, keepdims=True))
        kept, weights = jnp.exp(top_ref[...] - higher), jnp.exp(scores - higher)
        k_imp = given.k_imp[0, 0]
        top_ref[...] = higher
        total_ref[...] = total_ref[...] * kept + _sum_keys(weights)
        sum_ref[...] += _sum_keys(errors)
        added_ref[...] += _sum_keys(added)
        logs_ref[...] += _sum_keys(errors * logs)
        true_ref[...] += _product(k_imp, errors.astype(k_imp.dtype))
        predicted_ref[...] = predicted_ref[...] * kept + _product(k_imp, weights.astype(k_imp.dtype))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        total = total_ref[...]
        total = jnp.where(total == 0, 1.0, total)
        factor = 1.0 / ((1.0 + added_ref[...]) * jnp.maximum(given.of_rows[0, 1:], 1e-30))
        mass, true, lse = sum_ref[...], true_ref[...], top_ref[...] + jnp.log(total)
        agreement = _sum_keys(given.q_imp[0, 0].astype(jnp.float32) * true) + logs_ref[...]
        found.mass[0, 0], found.lse[0, 0], found.factor[0, 0] = mass * factor, lse, factor
        found.cross_entropy[0, 0] = (mass * lse - agreement) * factor
        found.dq_imp[0, 0] = (predicted_ref[...] * (mass / total) - true) * factor


def _key_gradients(spans_ref, *refs, plan):
    given = Operands(*refs[: len(Operands._fields)])
    mass_ref, lse_ref, factor_ref, dk_imp_ref, projected_ref, sum_ref = refs[len(given) :]
    b, j, m, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)

    @pl.when((m == 0) & (i == 0))
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    if plan.error == "centred":

        @pl.when(i == 0)
        def _():
            _write_parts(_project(given.v, given.gram), projected_ref)

    @pl.when((spans_ref[b, 0, j] <= i) & (i <= spans_ref[b, 1, j]))
    def _():
        values = [projected_ref[n] for n in range(projected_ref.shape[0])]
        errors, scores, _, _ = _tiles(given, values, [given.output[0, 0]], j * plan.block, plan)
        change = jnp.exp(scores - lse_ref[0, 0]) * mass_ref[0, 0] - errors * factor_ref[0, 0]
        q_imp = given.q_imp[0, 0]
        sum_ref[...] += _product(q_imp, change.astype(q_imp.dtype), (1, 1))

    @pl.when((m == plan.share - 1) & (i == pl.num_programs(4) - 1))
    def _():
        dk_imp_ref[0, 0] = sum_ref[...]


def _sum_keys(tile):
    """Sums over the keys of a tile, [1, C]."""
    return jnp.sum(tile, axis=0, keepdims=True)


def _tiles(given, values, outputs, first, plan):
    """What a tile adds to the sums of its rows, float32 [S, C].

    values, outputs: the factors of v W W^T o, of which one is given in parts. first: the tile's first key.

    Returns:
        The errors, each as often as its key counts, up to the factor of `RowSums`; the scores with the logarithm of
        how often a key counts; the attention weight that counting adds; and the logarithms. Keys that are not
        contested have errors of 0 and scores of -inf.
    """
    key = first + jax.lax.broadcasted_iota(jnp.int32, (plan.block, plan.block), 0)
    contested = (key >= given.bounds[0, :1]) & (key <= given.bounds[0, 1:2])
    logs = jnp.where(key < given.bounds[0, 2:], given.of_rows[0, :1], 0.0)
    scores = jnp.where(contested, _product(given.k_imp[0, 0], given.q_imp[0, 0], (0, 0)) + logs, -jnp.inf)
    logits = soft_cap(_product(given.k[0, 0], given.q[0, 0], (1, 1)), plan.softcap)
    single = jnp.exp(jnp.where(contested, logits - given.lse[0, 0], -jnp.inf))
    weights = single * jnp.exp(logs)
    added = weights - single
    if plan.error == "weight":
        return weights, scores, added, logs
    squares = jnp.transpose(given.squares[0, 0])
    if plan.error == "centred":
        cross = sum(_product(value, output, (1, 1)) for value in values for output in outputs)
        squares = squares + given.own[0, 0] - 2.0 * cross
    return weights * jnp.sqrt(jnp.maximum(squares, 0.0)), scores, added, logs


def _project(vectors_ref, gram_ref):
    """Vectors [S, D] times W W^T, float32; with vectors in bfloat16, W W^T is taken to 16 bits."""
    vectors = vectors_ref[0, 0]
    return sum(_product(vectors, part) for part in _split(gram_ref[0], vectors.dtype))


def _write_parts(matrix, parts_ref):
    """Write a matrix in parts of another dtype that sum to it."""
    for number, part in enumerate(_split(matrix, parts_ref.dtype)):
        parts_ref[number] = part


def _split(x, dtype):
    """A float32 matrix as a list of matrices of the dtype that sum to it: float32 itself, or two bfloat16."""
    if dtype == jnp.float32:
        return [x]
    high = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(2**16)), jnp.float32
    )  # not by a cast to bfloat16 and back, which XLA may leave out
    return [high.astype(dtype), (x - high).astype(dtype)]


def _product(a, b, contract=(1, 0)):
    """float32 product of matrices, summed over dimension contract[0] of a and contract[1] of b; exact in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = "highest" if b.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, precision=precision)


def _spans(bounds, block, *, of_keys):
    """The first and the last key block that each block of queries contests, int32 [B, 2, blocks].

    of_keys: the first and the last block of queries that contest each block of keys instead. Without one: 0 and -1.
    """
    batch, _, length = bounds.shape
    first, last = (x.reshape(batch, -1, block) for x in (bounds[:, 0], bounds[:, 1]))
    counted = first <= last
    first = jnp.min(jnp.where(counted, first, length), axis=2) // block
    last = jnp.max(jnp.where(counted, last, -1), axis=2) // block
    if not of_keys:
        return jnp.stack([jnp.where(last < 0, 0, first), last], axis=1)
    number = jnp.arange(length // block, dtype=jnp.int32)
    meet = (first[:, :, None] <= number[None, None]) & (number[None, None] <= last[:, :, None])
    begin = jnp.min(jnp.where(meet, number[None, :, None], length), axis=1)
    end = jnp.max(jnp.where(meet, number[None, :, None], -1), axis=1)
    return jnp.stack([jnp.where(end < 0, 0, begin), end], axis=1)


def _parameters(axes):
    """All axes of the grid but the last ones, over which a kernel sums, may run in parallel."""
    semantics = ("parallel",) * 3 + ("arbitrary",) * (axes - 3)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


def _cost(operands, plan, *, products):
    """Over half of the square; a product takes as long as one that is LANES deep."""
    batch, heads, length, dim = operands.q.shape
    pairs = batch * heads * length * length // 2
    read = 2 * pairs // plan.block * dim * operands.q.dtype.itemsize
    return pl.CostEstimate(flops=2 * products * pairs * LANES, transcendentals=3 * pairs, bytes_accessed=read)
