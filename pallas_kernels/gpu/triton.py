"""How a Triton kernel is launched, the sizes that its blocks have, and which tokens a row sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.operands import cache_row, layer_indices

LEAST = 16  # the smallest side of a product


def launch(kernel, operands, *, grid, out_shape, warps, interpret, name, stages=2):
    """Run a Triton kernel on whole arrays: kernel(references to the operands that are not None, by name, *results).

    An operand that is None is left out, so that no launch has to fill one.
    """
    given = {key: array for key, array in operands.items() if array is not None}

    def body(*refs):
        kernel(dict(zip(given, refs[: len(given)], strict=True)), *refs[len(given) :])

    return pl.pallas_call(
        body,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*given.values())


def padded_size(number):
    """The smallest power of two that is at least `number`, and that products allow as a side."""
    return max(LEAST, 1 << (number - 1).bit_length())


def place_operands(layer, lengths, first):
    """Operands that say where a row lies: layers [P], lengths [B], first [B]; None where they are not given."""
    layers = None if layer is None else layer_indices(layer)
    return dict(layers=layers, lengths=whole_numbers(lengths), first=whole_numbers(first))


def whole_numbers(array):
    """An operand of integers as int32; None stays None."""
    return None if array is None else array.astype(jnp.int32)


def seen_range(refs, sequence, size):
    """The first token that a sequence sees, and the end of its tokens."""
    begin = jnp.maximum(refs["first"][sequence], 0) if "first" in refs else jnp.int32(0)
    return begin, jnp.minimum(refs["lengths"][sequence], size) if "lengths" in refs else jnp.int32(size)


def source_row(refs, row, rows, heads=1):
    """The row of a cache that one of `rows` rows reads: `cache_row`, where layers are given."""
    return cache_row(refs["layers"], row, rows, heads) if "layers" in refs else row


def pairs(first, second):
    """Indices of every pair of two vectors, as two matrices."""
    shape = (first.shape[0], second.shape[0])
    return jnp.broadcast_to(first[:, None], shape), jnp.broadcast_to(second[None, :], shape)


def multiply_add(a, b, c, interpret):
    """a * b + c in float32, of a number and two vectors, with one rounding. The compiler would not fuse them."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if interpret:
        return a * b + c
    args = [jnp.broadcast_to(a, c.shape), b, c]
    shape = jax.ShapeDtypeStruct(c.shape, jnp.float32)
    options = dict(constraints="=f,f,f,f", pack=1, result_shape_dtypes=[shape])
    return plgpu.elementwise_inline_asm("fma.rn.f32 $0, $1, $2, $3;", args=args, **options)[0]
