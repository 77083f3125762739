"""Arguments of the operations as the implementations take them, and the module of an implementation."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import reference, xla
from pallas_kernels.arithmetic import finite_or_zero
from pallas_kernels.checks import check_number
from pallas_kernels.reference import LOWEST


def as_arrays(*values):
    """Lists and numpy arrays as jax arrays. None stays None."""
    return tuple(None if value is None else jnp.asarray(value) for value in values)


def factor_of(scale: float | None, queries: jax.Array) -> float:
    """The factor on products with queries [..., D] or [..., R]: that given, or the default."""
    if scale is None:
        return queries.shape[-1] ** -0.5
    check_number("scale", scale)
    return float(scale)


def normalises(pooling: str, q_imp: jax.Array, offset: jax.Array | None = None) -> bool:
    """Whether log-sum-exps are taken off the scores. One query head alone needs none, unless it has an offset."""
    return pooling == "normalised" and (q_imp.shape[2] > 1 or offset is not None)


def terms_of(pooling: str, q_imp: jax.Array, totals: jax.Array | None, offset: jax.Array | None) -> dict[str, Any]:
    """What is taken off the scores and added to them, as the implementations take it."""
    normalised = normalises(pooling, q_imp, offset)
    totals = totals if normalised else None
    if offset is not None:
        offset = jnp.clip(jnp.nan_to_num(offset.astype(jnp.float32), nan=LOWEST), LOWEST, -LOWEST)
        if totals is not None or not normalised:  # known before the kernel: one term
            totals, offset, normalised = (0.0 if totals is None else finite_or_zero(totals)) - offset, None, True
    return dict(normalised=normalised, totals=totals, offset=offset)


def dispatch(name: str, interpret: Any, work: int) -> tuple[ModuleType, dict[str, Any]]:
    """The module of an implementation, imported on first use, and the options that it alone takes.

    work is 0 where an array is empty. The reference runs then, since kernels have blocks of at least one element.
    """
    if name == "reference" or work == 0:
        return reference, {}
    if name == "xla":
        return xla, {}
    if name == "tpu":
        from pallas_kernels import tpu as kernels
    else:
        from pallas_kernels import gpu as kernels
    return kernels, {"interpret": interpret or False}
