"""H2O (Zhang et al. 2023, arXiv 2306.14048): the newest tokens, and those with the most accumulated attention."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from butler_jax.policies.eviction import Evicting


@dataclass(frozen=True, kw_only=True)
class H2O(Evicting):
    """A token is worth the attention that all rows so far gave it while it was kept; half of the budget is recent."""

    name = "h2o"

    def begin(self, shape):
        """No attention yet."""
        return jnp.zeros(shape, jnp.float32)

    def observe(self, memory, weights, place, budget):
        """Add the row's attention."""
        return jnp.where(place.first, 0.0, memory) + weights

    def worth(self, memory):
        """The accumulated attention."""
        return memory

    def recent(self, budget):
        """Half of the budget."""
        return budget // 2
