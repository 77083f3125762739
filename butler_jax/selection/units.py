"""How many units a row chooses: its budget in whole units, given which tokens it may see."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from butler_jax.selection.config import SelectionConfig


class Units(NamedTuple):
    """The units of each row. Units and tokens are counted from the start of the row's document.

    Attributes:
        number: The number of each unit; unit u holds the tokens u*unit ... u*unit+unit-1.
        first: The first token that the row may see.
        end: The end of the tokens that it may see; end - 1 is its own.
    """

    number: Int[Array, "*B U"]
    first: Int[Array, "*B"]
    end: Int[Array, "*B"]

    @property
    def held(self) -> Int[Array, "*B"]:
        """How many tokens a row may see."""
        return self.end - self.first

    def seen(self, unit: int) -> Bool[Array, "*B U"]:
        """The units that hold tokens which the row may see."""
        begin = self.number * unit
        return (begin + unit > self.first[..., None]) & (begin < self.end[..., None])

    def forced(self, config: SelectionConfig) -> Bool[Array, "*B U"]:
        """The units that hold sinks or recent tokens."""
        begin, first, end = self.number * config.unit, self.first[..., None], self.end[..., None]
        sinks = (begin < config.sinks) & (first < config.sinks)
        return self.seen(config.unit) & (sinks | (begin + config.unit > end - config.recent))


def count_units(tokens: Int[Array, "*B"], units: Units, config: SelectionConfig) -> Int[Array, "*B"]:
    """How many units each row chooses, sinks and recent included: the most whose tokens are within its budget.

    With neighbours, only half of the budget beside sinks and recent is chosen, unless the budget is everything. tokens:
    the budget of each row, at most `units.held`, and at least `config.least` or everything.
    """
    count, everything = tokens, tokens >= units.held
    if config.unit > 1:
        # The newest unit may hold fewer tokens: n units hold its own and at most (n - 1) * unit others.
        newest = jnp.minimum((units.end - 1) % config.unit + 1, units.held)
        whole = (units.end - 1) // config.unit - units.first // config.unit + 1
        count = jnp.where(everything, whole, 1 + (tokens - newest) // config.unit)
        count = jnp.where(units.held > 0, count, 0)
    if config.neighbours:
        forced = jnp.sum(units.forced(config), axis=-1, dtype=jnp.int32)
        count = jnp.where(everything, count, forced + (count - forced) // 2)
    return count
