"""A budget in tokens: how many a row of any length may read, and the room that a choice needs."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import BaseConfig
from butler_jax.selection.config import LIMITED, SelectionConfig


def budget_table(config: SelectionConfig, length: int) -> Int[np.ndarray, " S"]:
    """The budgets in tokens of rows of 0 ... length tokens, int32 [length + 1], as jitted code takes them.

    A fraction of n tokens is ceil(budget * n), exact for the decimal or simple ratio that was written (0.1 of 10 is 1
    and 1/3 of 3 is 1, whatever their binary form). It is at least `config.least` (sinks and recent, in whole pages). A
    row reads at most its n tokens, and all of them up to `config.min_context`.
    """
    lengths = np.arange(length + 1, dtype=np.int64)
    if isinstance(config.budget, int):
        wanted = np.full_like(lengths, config.budget)
    else:
        fraction = Fraction(repr(float(config.budget))).limit_denominator(1_000_000)
        wanted = np.maximum(-(-lengths * fraction.numerator // fraction.denominator), config.least)
    wanted = np.where(lengths <= config.min_context, lengths, wanted)
    return np.minimum(wanted, lengths).astype(np.int32)


class Limits(NamedTuple):
    """The part of a selection that jitted code takes as data.

    Attributes:
        table: `budget_table`.
        threshold: The lowest score that is read, of every layer and choosing head (or 1 for all heads); None reads by
            the budget alone. Under top_p, the logarithm of the weight that may stay unread (mass.py).
        min_context: Rows of up to this many tokens read everything.
        prompts: The tokens of every document of a sequence that are a prompt, whose rows read everything; None without.
        served: The layers that are served; None where all but layer 0 are. The others read everything.
    """

    table: Int[Array, " S+1"]
    threshold: Float[Array, "L K"] | None
    min_context: int
    prompts: Int[Array, " B"] | None = None
    served: Bool[Array, " L"] | None = None


def limits_of(config: SelectionConfig, base: BaseConfig, length: int, heads: int) -> Limits:
    """The limits of a selection for rows of up to `length` tokens, and so many choosing heads in a layer.

    Raises:
        ValueError: The thresholds are not those of a model and a policy of these sizes, or the tolerance is missing.
    """
    threshold = None
    config.require_tolerance()
    if config.allocation in LIMITED:
        with np.errstate(divide="ignore"):
            threshold = jnp.full((base.layers, 1), np.log(config.tolerance), jnp.float32)
    if config.threshold is not None:
        shape = len(config.threshold), len(config.threshold[0])
        if shape != (base.layers, heads):
            raise ValueError(
                f"thresholds of {shape[0]} layers and {shape[1]} heads do not fit a model of {base.layers} layers and "
                f"a policy that chooses for {heads} heads in each; calibrate them on this model with this policy"
            )
        threshold = jnp.asarray(config.threshold, jnp.float32)
    served = jnp.asarray(base.served) if base.mixed else None
    return Limits(jnp.asarray(budget_table(config, length)), threshold, min(config.min_context, length), served=served)


def beyond(
    min_context: Int[Array, ""] | int, lengths: Int[Array, ...], threshold: Float[Array, ...] | None
) -> Float[Array, ...] | None:
    """The threshold for rows of more than min_context tokens, -inf for the others; shapes broadcast."""
    return None if threshold is None else jnp.where(lengths > min_context, threshold, -jnp.inf)


def room_for(config: SelectionConfig, capacity: int, most: int | None = None, *, heads: int = 1) -> int:
    """The number N of units that a choice has room for, enough for any row of a cache of `capacity` tokens.

    most: the largest budget in tokens, where it is known. With an interval above 1 it is ignored, so that all choices
    have the same room.
    """
    most = int(np.max(budget_table(config, capacity))) if most is None or config.interval > 1 else most
    units = -(-most // config.unit) + (config.unit > 1)
    return min(units * (heads if config.allocation == "per_layer" else 1), -(-capacity // config.unit))
