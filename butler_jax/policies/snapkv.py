"""SnapKV (Li et al. 2024, arXiv 2404.14469): what the newest rows look at, pooled over neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from butler_jax.configs import require
from butler_jax.policies.evicting import Evicting


@dataclass(frozen=True, kw_only=True)
class SnapKV(Evicting):
    """A token is worth the attention of the last `observed` rows, the maximum over `pool` neighbours; those rows stay.

    Published for the end of a prompt, where it chooses once. Here every row is the end of a prompt of its own, and what
    an earlier one dropped is gone.
    """

    name = "snapkv"
    observed: int = 32
    pool: int = 7

    def __post_init__(self):
        require(self.observed >= 1, f"snapkv must observe at least 1 row, got {self.observed}")
        require(self.pool >= 1 and self.pool % 2 == 1, f"snapkv pools an odd number of tokens, got {self.pool}")

    def begin(self, shape):
        """The attention of the last rows, and its sum."""
        return jnp.zeros((self.observed, *shape), jnp.float32)

    def observe(self, memory, weights, row):
        """The newest row takes the place of the oldest."""
        return jax.lax.dynamic_update_index_in_dim(memory, weights, row % self.observed, 0)

    def worth(self, memory):
        """The pooled sum over the rows."""
        side = self.pool // 2
        window, padding = (1, 1, self.pool), ((0, 0), (0, 0), (side, side))
        return jax.lax.reduce_window(jnp.sum(memory, axis=0), -jnp.inf, jax.lax.max, window, (1, 1, 1), padding)

    def recent(self, budget):
        """The observed rows, as far as half of the budget goes."""
        return jnp.minimum(self.observed, budget // 2)
