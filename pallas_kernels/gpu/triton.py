"""How a Triton kernel is launched, the sizes that its blocks have, and which tokens a row sees."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LEAST = 16  # the smallest side of a product


def launch(kernel, operands, *, grid, out_shape, warps, interpret, name, stages=2):
    """Run a Triton kernel on whole arrays. Each operand of the kernel is a reference to a whole array."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*operands)


def padded_size(number):
    """The smallest power of two that a product allows and that is at least `number`."""
    return max(LEAST, 1 << (number - 1).bit_length())


def place_operands(layer, lengths, first, batch, size):
    """(layer [1], lengths [B], first [B]) as kernels read them. What is not given is a constant, not a launch."""
    layer = np.zeros(1, np.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
    lengths = np.full(batch, size, np.int32) if lengths is None else lengths.astype(jnp.int32)
    return layer, lengths, np.zeros(batch, np.int32) if first is None else first.astype(jnp.int32)


def seen_range(lengths_ref, first_ref, sequence, size):
    """The first token that a sequence sees, and the end of its tokens."""
    return jnp.maximum(first_ref[sequence], 0), jnp.minimum(lengths_ref[sequence], size)
