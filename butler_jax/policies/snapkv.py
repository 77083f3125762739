"""SnapKV (Li et al. 2024, arXiv 2404.14469): the attention of the newest rows, pooled over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from butler_jax.policies.eviction import Evicting
from butler_jax.storage import settle_types


class Recent(NamedTuple):
    """A running sum of the attention of the last `observed` rows, updated with a few additions for each row.

    Attributes:
        rows: Attention of each row of this round at its slot, its position modulo `observed`. The later slots belong to
            the round before, and each holds the sum of its own row and all later ones.
        new: Sum over the rows of this round.
        total: Sum over the last `observed` rows.
    """

    rows: Float[Array, "observed B K S"]
    new: Float[Array, "B K S"]
    total: Float[Array, "B K S"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Evicting):
    """A token is worth the attention of the last `observed` rows, the maximum over `pool` neighbours. Those rows stay.

    As published, it chooses once, at the end of a dense prompt. The publication keeps all generated tokens in addition;
    here the budget holds, and each step drops a token. Simulated, or with once=False, every row chooses as if it ended
    a prompt, among the tokens that earlier rows kept.

    Attributes:
        observed: Newest rows whose attention counts.
        pool: Tokens over which the maximum is taken, an odd number.
        once: See `Evicting`.
    """

    name = "snapkv"
    form = (
        "simulated row after row, and pooled with the observed rows; published as one cut at the end of a dense "
        "prompt, and pooled without them"
    )
    observed: int = 32
    pool: int = 7
    once: bool = True

    def __post_init__(self):
        settle_types(self)
        if self.observed < 1:
            raise ValueError(f"snapkv must observe at least 1 row, got {self.observed}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"snapkv pools an odd number of tokens, got {self.pool}")

    def begin(self, shape):
        """No attention yet."""
        nothing = jnp.zeros(shape, jnp.float32)
        return Recent(jnp.zeros((self.observed, *shape), jnp.float32), nothing, nothing)

    def observe(self, memory, weights, place, budget):
        """Replace the oldest row by the newest."""
        batch = jnp.arange(weights.shape[0])
        slot = (place.own - place.start) % self.observed
        turn = (slot == 0)[:, None, None]

        def begin_round():
            sums = jax.lax.cumsum(memory.rows, axis=0, reverse=True)
            return jnp.where(turn[None], jnp.where(place.first[None], 0.0, sums), memory.rows)

        rows = jax.lax.cond(jnp.any(slot == 0), begin_round, lambda: memory.rows)
        new = jnp.where(turn, 0.0, memory.new) + weights
        old = rows[jnp.minimum(slot + 1, self.observed - 1), batch]
        old = jnp.where((slot + 1 < self.observed)[:, None, None], old, 0.0)
        return Recent(rows.at[slot, batch].set(weights), new, new + old)

    def worth(self, memory):
        """The sum over the rows, pooled over neighbours."""
        size, side = memory.total.shape[-1], self.pool // 2
        padded = jnp.pad(memory.total, ((0, 0), (0, 0), (side, side)), constant_values=-jnp.inf)
        return reduce(jnp.maximum, [padded[..., i : i + size] for i in range(self.pool)])

    def recent(self, budget):
        """The observed rows, at most half of the budget."""
        return jnp.minimum(self.observed, budget // 2)
