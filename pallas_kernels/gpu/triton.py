"""How a Triton kernel is launched, and the sizes that its blocks have."""

from __future__ import annotations

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LEAST = 16  # the smallest side of a product


def launch(kernel, operands, *, grid, out_shape, warps, interpret, name):
    """Run a Triton kernel on whole arrays. Each operand of the kernel is a reference to a whole array."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*operands)


def padded_size(number):
    """The smallest power of two that a product allows and that is at least `number`."""
    return max(LEAST, 1 << (number - 1).bit_length())
