"""Scores by the error in the residual stream that a step makes by not reading a token.

Query head h of a layer with residual stream x gives token i the weight a_i, and W_h is its slice of the output
projection. The token contributes a_i v_i W_h to the stream. Dropping it changes the stream, relative to its norm, by

    a_i |v_i W_h| / |x|                  "value": the contribution itself
    a_i |(v_i - o) W_h| / |x|            "centred": after renormalisation, but for 1 / (1 - a_i); o is the row's output
    a_i / |x|                            "weight": as if all values were of norm 1
    (a_i + 1e-4) |v_i W|_1 / |x|         "critical": the score of CriticalKV (Feng et al. 2025, arXiv 2502.03805), as
                                         kvpress has it: the mean L1 norm over the heads of the group. CriticalKV
                                         first chooses half of the budget by a_i alone, which is left out here

All heads and layers have this one unit, so their tokens can be ranked together. Scores are the logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from butler_jax.model import centred_squares, masked_softmax, output_gram, output_projection, project_values
from butler_jax.policies.scoring import Chunk, Scoring, largest_in_group, log_total
from butler_jax.storage import settle_types

Error = Literal["centred", "value", "weight", "critical"]
Pooling = Literal["maximum", "root_sum_square"]

LEAST_WEIGHT = 1e-4  # that "critical" adds to every attention weight
SMALLEST = 1e-30  # squared norms below it count as it, so that logarithms are finite


@dataclass(frozen=True, kw_only=True)
class OracleResidual(Scoring):
    """Scores by the error in the residual stream, from the true attention weights.

    Attributes:
        error: Which of the errors of this module.
        pooling: How the errors of a group are combined: their maximum, or the root of the sum of their squares.
    """

    name = "oracle_residual"
    is_bound = True
    one_unit = True
    error: Error = "centred"
    pooling: Pooling = "maximum"

    def __post_init__(self):
        settle_types(self)

    def numbers_read_per_key(self, base, predictor):
        """Whole keys and whole values are read."""
        return 2.0 * base.head_dim

    def scores(self, chunk: Chunk):
        """The logarithm of the error per query head."""
        allowed = jnp.where(chunk.allowed[:, None, None], chunk.logits, -jnp.inf)
        weights = chunk.logits - log_total(allowed, chunk.sink_logits)
        if self.error == "critical":
            weights = jnp.logaddexp(weights, jnp.log(LEAST_WEIGHT))
        return weights + log_value_norms(chunk, self.error) - log_stream_norm(chunk)

    def pool(self, scores, chunk: Chunk):
        """The error of the group."""
        return pool_errors(scores, self.pooling)


def log_value_norms(chunk: Chunk, error: Error) -> Float[Array, "B K G _ _"]:
    """log |v_i W_h| of every key, log |(v_i - o) W_h| of every row and key, or 0; rows and keys broadcast.

    Under "critical" it is the logarithm of the mean L1 norm of v_i W_h over the heads of the group.
    """
    if error == "weight":
        return jnp.zeros((1,) * 5)
    if error == "critical":
        norms = _mean_l1_norms(output_projection(chunk.weights), chunk.v)
        return jnp.log(jnp.maximum(norms, SMALLEST))[:, :, None, None]
    gram = output_gram(output_projection(chunk.weights), chunk.v.shape[1])
    projected, squares = project_values(chunk.v, gram)
    if error == "value":
        squares = squares[:, :, :, None]
    else:
        weights = masked_softmax(chunk.logits, chunk.allowed[:, None, None], chunk.sink_logits)
        output = jnp.einsum("bkgcs,bksd->bkgcd", weights, chunk.v.astype(jnp.float32), precision="highest")
        squares = centred_squares(output, projected, squares, gram)
    return 0.5 * jnp.log(jnp.maximum(squares, SMALLEST))


def _mean_l1_norms(output: Float[Array, "H D E"], v: Float[Array, "B K S D"]) -> Float[Array, "B K S"]:
    """The L1 norm of v W_h, mean over the heads of a group; one head of each group after the other, to save memory."""
    output = output.astype(jnp.float32).reshape(v.shape[1], -1, *output.shape[1:])

    def add(total, one):
        projected = jnp.einsum("bksd,kde->bkse", v.astype(jnp.float32), one, precision="highest")
        return total + jnp.sum(jnp.abs(projected), axis=-1), None

    total, _ = jax.lax.scan(add, jnp.zeros(v.shape[:3], jnp.float32), jnp.moveaxis(output, 1, 0))
    return total / output.shape[1]


def log_stream_norm(chunk: Chunk) -> Float[Array, "B 1 1 C 1"]:
    """log |x| of every row."""
    squares = jnp.sum(jnp.square(chunk.x.astype(jnp.float32)), axis=-1)
    return 0.5 * jnp.log(jnp.maximum(squares, SMALLEST))[:, None, None, :, None]


def pool_errors(scores: Float[Array, "B K G C S"], pooling: Pooling) -> Float[Array, "B K C S"]:
    """The error of a group, whose heads read a token together."""
    if pooling == "maximum":
        return largest_in_group(scores)
    return 0.5 * jax.nn.logsumexp(2 * scores, axis=2)
