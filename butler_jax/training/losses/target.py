"""What the scores of a predictor are trained to be: attention weights, or errors in the residual stream.

The error of a token is what a step changes in the stream by not reading it (policies/residual.py). The offset of a row
and query head makes a score the logarithm of the error itself, so that scores of all heads and layers compare.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SMALLEST = 1e-6
"""Sums of errors below it count as it, so that the logarithm which an offset is trained for is bounded."""


PENALTY = 0.1
"""Weight of the squared penalty of an offset, beside the cross entropy.

Its gradient does not reach the scores: the errors of a row sum to some hundredths, so the penalty would outweigh the
cross entropy there."""


class FarKeys(NamedTuple):
    """Keys that stand for several ones in the cross entropy of a row, since positions were skipped behind them.

    Attributes:
        end: The column behind the last of them, for each row; 0 where there are none.
        log_count: The logarithm of how many keys each stands for.
    """

    end: Int[Array, "B T"]
    log_count: Float[Array, "B T"]


class ErrorTarget(NamedTuple):
    """The target of a layer's scores, where it is an error in the residual stream.

    Attributes:
        gram: `model.output_gram` of the layer.
        norm: Norm of the residual stream that enters the layer.
        offset: Of the predictor, for every row and query head.
        far: Keys that stand for several; None where each stands for itself.
    """

    gram: Float[Array, "K G D D"]
    norm: Float[Array, "B T"]
    offset: Float[Array, "B T H"]
    far: FarKeys | None = None


class ErrorRule(NamedTuple):
    """How an error target is trained for; static.

    Attributes:
        error: "weight" is a / |x|, "value" a |v W| / |x| and "centred" a |(v - o) W| / |x|, with o the row's output.
        normalised: Whether the offset is that of scores from which their log-sum-exp is taken off.
    """

    error: Literal["weight", "value", "centred"]
    normalised: bool = False


def log_total(mass: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The logarithm of the summed errors of a row."""
    return jnp.log(jnp.maximum(mass, SMALLEST))


def offset_penalty(
    offset: Float[Array, "*B"],
    lse: Float[Array, "*B"],
    mass: Float[Array, "*B"],
    use: Float[Array, "*#B"],
    rule: ErrorRule,
) -> tuple[Float[Array, ""], Float[Array, "*B"]]:
    """The penalty of offsets, and its gradient for each.

    Args:
        lse: The log-sum-exp of the scores of a row over its contested keys.
        mass: The summed errors of a row.
        use: 1 for rows that count, else 0.
    """
    miss = offset + (0.0 if rule.normalised else lse) - log_total(mass)
    miss = jnp.where(use > 0, miss, 0.0)  # a product with 0 may be rewritten by the compiler, and its square overflow
    return PENALTY * jnp.sum(jnp.square(miss)), 2 * PENALTY * miss
