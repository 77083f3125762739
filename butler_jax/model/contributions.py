"""What the values of a layer contribute to the residual stream, as norms: no array of width E is formed.

Query head h has the slice W_h [D, E] of the output projection. |v W_h|^2 is v (W_h W_h^T) v^T, a form of D numbers.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

EXACT = dict(preferred_element_type=jnp.float32, precision="highest")


def output_projection(weights: Any) -> Float[Array, "H D E"]:
    """What the values of a layer go through into the residual stream.

    It is the output projection, times the scale of the norm of the attention's output in families that have one. That
    norm also divides by the root mean square of the row's output, which is left out: it is the same for all tokens of a
    row. So is a residual scale (`BaseConfig.residual_scale`): it is the same for all tokens of the model.

    Args:
        weights: The parameters of a layer, as its view has them.
    """
    norm = getattr(weights, "attention_output_norm", None)
    return weights.o[...] if norm is None else weights.o[...] * norm[...][None, None].astype(weights.o.dtype)


def output_gram(output: Float[Array, "H D E"], kv_heads: int) -> Float[Array, "K G D D"]:
    """W_h W_h^T of every query head of an output projection, float32."""
    output = output.astype(jnp.float32)
    gram = jnp.einsum("hde,hfe->hdf", output, output, **EXACT)
    return gram.reshape(kv_heads, -1, *gram.shape[1:])


def project_values(
    v: Float[Array, "B K S D"], gram: Float[Array, "K G D D"]
) -> tuple[Float[Array, "B K G S D"], Float[Array, "B K G S"]]:
    """v W W^T and |v W|^2 of every value and query head, float32."""
    v = v.astype(jnp.float32)
    projected = jnp.einsum("bksd,kgde->bkgse", v, gram, **EXACT)
    return projected, jnp.einsum("bkgse,bkse->bkgs", projected, v, **EXACT)


def centred_squares(
    output: Float[Array, "B K G C D"],
    projected: Float[Array, "B K G S D"],
    squares: Float[Array, "B K G S"],
    gram: Float[Array, "K G D D"],
) -> Float[Array, "B K G C S"]:
    """|(v - o) W|^2 of every row with attention output o and every value; the others as from `project_values`.

    A difference of squares: it is exact to a few float32 roundings of |v W|^2, and may be slightly below 0.
    """
    own = jnp.einsum("bkgcd,kgde,bkgce->bkgc", output, gram, output, **EXACT)
    return squares[:, :, :, None] + own[..., None] - 2 * jnp.einsum("bkgcd,bkgsd->bkgcs", output, projected, **EXACT)
