"""The neighbour fetch of TokenButler (arXiv 2503.07518): chosen runs bring the units to their right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from butler_jax.selection.config import SelectionConfig
from butler_jax.selection.units import Units


def add_neighbours(mask: Bool[Array, "B K *C U"], units: Units, config: SelectionConfig) -> Bool[Array, "B K *C U"]:
    """The chosen units, and the neighbours, which a row may see, of those that scores chose.

    Scores chose at most half of the budget (`count_units`), and each unit brings at most one neighbour. So all of them
    fit into the budget.
    """
    return mask | (right_of_runs(mask & ~units.forced(config)) & units.seen(config.unit))


def right_of_runs(mask: Bool[Array, "*B U"]) -> Bool[Array, "*B U"]:
    """For every run of c set entries the c entries to its right: {3, 4, 9} gives {5, 6, 10}."""
    at = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    before = jax.lax.cummax(jnp.where(mask, -1, at), axis=mask.ndim - 1)  # the last entry that is not set
    last = mask & ~jnp.pad(mask[..., 1:], ((0, 0),) * (mask.ndim - 1) + ((0, 1),))
    reach = jax.lax.cummax(jnp.where(last, 2 * at - before, -1), axis=mask.ndim - 1)
    return ~mask & (reach >= at)
