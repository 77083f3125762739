"""What policies have in common that evict: a token that is dropped cannot come back, row after row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.configs import SelectionConfig, require
from butler_jax.policies.interface import Chunk, Policy


@dataclass(frozen=True, kw_only=True)
class Evicting(Policy):
    """A policy that keeps a set of tokens per KV head and drops the worst of it whenever a row's budget is exceeded.

    A subclass says with `begin`, `observe` and `worth` what a token is worth, from the attention of earlier rows among
    the tokens kept then, and with `recent` how many of the newest are never dropped.
    """

    evicts: ClassVar[bool] = True

    def scores(self, chunk: Chunk):
        """There are none: what is worth most depends on all rows before."""
        require(False, f"the policy {self.name} evicts for good: it is simulated by eval.py, decoding does not have it")

    def selection(self, config: SelectionConfig) -> SelectionConfig:
        """Raises ValueError for what means nothing to a policy that evicts."""
        plain = config.unit == 1 and config.threshold is None and not config.neighbours
        require(plain, f"the policy {self.name} evicts token by token: leave out unit, threshold and neighbours")
        return config

    def begin(self, shape: tuple[int, int, int]) -> Any:
        """What is remembered of attention before the first row; shape: [B, K, S]."""
        raise TypeError(f"{type(self).__name__} must define begin")

    def observe(self, memory: Any, weights: Float[Array, "B K S"], row: Int[Array, ""]) -> Any:
        """The memory after a row; weights: its attention among the tokens kept, summed over the group."""
        raise TypeError(f"{type(self).__name__} must define observe")

    def worth(self, memory: Any) -> Float[Array, "B K S"]:
        """What every token is worth; of those that may be dropped, the least goes first, ties to the oldest."""
        raise TypeError(f"{type(self).__name__} must define worth")

    def recent(self, budget: Int[Array, " B"]) -> Int[Array, " B"]:
        """How many of the newest tokens stay, of a budget in tokens."""
        raise TypeError(f"{type(self).__name__} must define recent")


def evict(
    candidates: Bool[Array, "B K S"],
    worth: Float[Array, "B K S"],
    protected: Bool[Array, "B S"],
    budget: Int[Array, " B"],
) -> Bool[Array, "B K S"]:
    """The candidates less the one that is worth least, where they are more than the budget."""
    worth = jnp.where(candidates & ~protected[:, None], worth, jnp.inf)
    least = jnp.argmin(worth, axis=-1)
    over = jnp.sum(candidates, axis=-1, dtype=jnp.int32) > budget[:, None]
    columns = jnp.arange(candidates.shape[-1], dtype=least.dtype)[None, None]
    return candidates & ~((columns == least[..., None]) & over[..., None])
