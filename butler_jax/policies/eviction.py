"""Policies that evict: each row may drop tokens, and a dropped token does not come back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.policies.base import Policy
from butler_jax.selection import SelectionConfig, select_best


class Place(NamedTuple):
    """Columns of one row of each sequence.

    Attributes:
        own: The row's own column; negative before the first row.
        start: Column of the first token of its document.
    """

    own: Int[Array, " B"]
    start: Int[Array, " B"]

    @property
    def first(self) -> Bool[Array, "B 1 1"]:
        """Whether it is the first row of its document. The memory then belongs to other documents."""
        return (self.own == self.start)[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Evicting(Policy):
    """Base class of policies that evict. Each KV head keeps a set of tokens and drops the worst beyond the budget.

    A subclass defines what a token is worth by the attention that earlier rows of the document paid to the tokens kept
    (`begin`, `observe`, `worth`), and how many of the newest tokens are never dropped (`recent`).

    Attributes:
        once: Whether decoding reads the prompt densely and the first step after it cuts the cache down to the budget.
            In a simulation each row drops what is beyond its budget (`row_by_row`). The rows of a prompt drop nothing.
    """

    once: ClassVar[bool] = False

    def selection(self, config: SelectionConfig) -> SelectionConfig:
        """The selection unchanged.

        Raises:
            ValueError: A setting has no meaning for a policy that evicts.
        """
        if config.unit != 1 or config.threshold is not None or config.neighbours:
            raise ValueError(f"the policy {self.name} evicts token by token: leave out unit, threshold and neighbours")
        if config.tail:
            raise ValueError(f"the policy {self.name} keeps nothing of what it drops: leave out the tail")
        if config.interval != 1:
            raise ValueError(f"the policy {self.name} evicts at every row: leave out the interval")
        return super().selection(config)

    @property
    def generation_mode(self) -> str:
        """How a prompt and new tokens are read in generation, for reports."""
        if self.once:
            return "the prompt is prefilled densely and cut once, at its end; then every new token drops one"
        return "the prompt is read under the policy, which drops its tokens row after row, and so is every new token"

    def row_by_row(self) -> Evicting:
        """The policy that drops tokens at every row."""
        return dataclasses.replace(self, once=False) if self.once else self

    def begin(self, shape: tuple[int, int, int]) -> Any:
        """The memory of attention before the first row, for a shape (B, K, S); a larger S only appends to it."""
        raise TypeError(f"{type(self).__name__} must define begin")

    def observe(self, memory: Any, weights: Float[Array, "B K S"], place: Place, budget: Int[Array, " B"]) -> Any:
        """The memory after a row.

        Args:
            memory: The memory before the row. At the first row of a document it must have no effect.
            weights: The row's attention among the tokens kept, summed over the group.
        """
        raise TypeError(f"{type(self).__name__} must define observe")

    def worth(self, memory: Any) -> Float[Array, "B K S"]:
        """The worth of every token, finite. The lowest is dropped first, and of equal ones the oldest."""
        raise TypeError(f"{type(self).__name__} must define worth")

    def recent(self, budget: Int[Array, " B"]) -> Int[Array, " B"]:
        """How many of the newest tokens stay under a budget in tokens, as far as sinks leave room."""
        raise TypeError(f"{type(self).__name__} must define recent")


def evict(
    candidates: Bool[Array, "B K S"],
    worth: Float[Array, "B K S"],
    protected: Bool[Array, "B S"],
    budget: Int[Array, " B"],
) -> Bool[Array, "B K S"]:
    """The candidates without those beyond the budget that are worth least; protected tokens always stay.

    One is dropped, or several at the row where min_context ends. NaN counts as -inf.
    """
    free = candidates & ~protected[:, None]
    most = jnp.finfo(worth.dtype).max
    worth = jnp.clip(jnp.where(jnp.isnan(worth), -most, worth), -most, most)  # inf is what is not free
    over = jnp.sum(candidates, axis=-1, dtype=jnp.int32) - budget[:, None]

    def one():
        value = jnp.where(free, worth, jnp.inf)
        columns = jnp.arange(worth.shape[-1], dtype=jnp.int32)[None, None]
        least = jnp.min(value, axis=-1, keepdims=True)  # XLA's argmin is slower on CPU
        first = jnp.min(jnp.where(value == least, columns, worth.shape[-1]), axis=-1, keepdims=True)
        return candidates & ~((columns == first) & free & (over > 0)[..., None])

    def several():
        left = jnp.sum(free, axis=-1, dtype=jnp.int32) - jnp.maximum(over, 0)
        newest_first = jnp.flip(worth, axis=-1), jnp.flip(free, axis=-1)
        best = jnp.flip(select_best(*newest_first, jnp.maximum(left, 0)), axis=-1)
        return candidates & (protected[:, None] | best)

    return jax.lax.cond(jnp.any(over > 1), several, one)
