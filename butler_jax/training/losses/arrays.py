"""What both losses do with their arrays: check their shapes, and scale the gradients of the forward pass."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.model import attention


def check_shapes(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_imp: Float[Array, "B T H R"],
    k_imp: Float[Array, "B T Q R"],
    segments: Int[Array, "B T"] | None,
    sliding_window: int | None,
) -> None:
    """Raise ValueError unless the arrays of a loss fit together."""
    attention.check_shapes(q, k, v, segments, sliding_window)
    if q_imp.ndim != 4 or k_imp.ndim != 4 or q_imp.shape[:3] != q.shape[:3] or k_imp.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q_imp must be [B, T, H, R] and k_imp [B, T, Q, R] for q {q.shape}; got {q_imp.shape} and {k_imp.shape}"
        )
    if q_imp.shape[3] != k_imp.shape[3]:
        raise ValueError(f"q_imp and k_imp must have the same width R, got {q_imp.shape[3]} and {k_imp.shape[3]}")
    if k_imp.shape[2] not in (q.shape[2], k.shape[2]):
        raise ValueError(
            f"k_imp must have {k.shape[2]} (KV) or {q.shape[2]} (query) heads, got {k_imp.shape[2]}; "
            "use as many heads as k or as q"
        )


def scale_gradients(gradients: tuple[Array, ...], cotangent: Float[Array, ""]) -> tuple[Array, ...]:
    """The gradients formed in the forward pass, times the gradient of the loss sum."""
    return tuple((cotangent * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
