"""How the heads of a layer share their reads: units of all heads ranked together under the sum of their budgets."""

from __future__ import annotations

from fractions import Fraction

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from butler_jax.selection.config import SelectionConfig
from pallas_kernels import BARRED, TOP, top_mask


def allocate(
    image: Int[Array, "B K *C U"], count: Int[Array, "B K *C"], config: SelectionConfig
) -> Bool[Array, "B K *C U"]:
    """The units that each head reads under an allocation.

    Of equal images the earlier unit comes first, and under per_layer those of an earlier head before.

    Args:
        image: Image of every unit (`pallas_kernels.rank_image`).
        count: Units that each head would read by itself, at most those above BARRED.
        config: Of it, allocation and floor are used.

    Returns:
        The mask: `count` units of each head, or under per_layer as many of all heads together as their sum.
    """
    if config.allocation != "per_layer":
        return top_mask(image, count)
    if config.floor:
        least = Fraction(config.floor).limit_denominator(1000)  # float32 would round some products up
        own = top_mask(image, -(-count * least.numerator // least.denominator))
        image = jnp.where(own & (image > BARRED), TOP, image)
    joint = jnp.moveaxis(image, 1, -2)
    mask = top_mask(joint.reshape(*joint.shape[:-2], -1), jnp.sum(count, axis=1, dtype=jnp.int32))
    return jnp.moveaxis(mask.reshape(joint.shape), -2, 1)
