"""Next-token predictions of a pass: likelihoods, greedy tokens, and how they differ from another pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import BaseModel, logits
from butler_jax.predictors import zeros_of
from butler_jax.simulation.sharding import rows_here, split_row_groups, split_tables

LOGIT_ROWS = 64  # rows of logits formed at a time
NO_TOKEN = -1  # the most likely token where the largest logit is not finite


def predict_next(
    model: BaseModel,
    x: Float[Array, "B T E"],
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    wanted: Bool[Array, "B T"] | None = None,
    reference: Float[Array, "B T E"] | None = None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """Predict the next token of every row, with the logits of a few rows at a time.

    Args:
        x: The last residual stream.
        wanted: Rows whose next token is asked for; None asks for all. Groups of rows without one are skipped.
        reference: The last residual stream of another pass; None compares nothing.

    Returns:
        Nll, greedy, divergence and agrees of `Simulated`. All but greedy are 0 where `has_next` is false.
    """
    batch, length = tokens.shape
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    chunks = -(-length // LOGIT_ROWS)
    pad = chunks * LOGIT_ROWS - length
    model = split_tables(model)

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return jnp.swapaxes(a.reshape(batch, chunks, LOGIT_ROWS, *a.shape[2:]), 0, 1)

    def told(stream, following, other):
        values = logits(model, rows_here(stream))
        best = jnp.argmax(values, axis=-1).astype(jnp.int32)
        greedy = jnp.where(jnp.isfinite(jnp.max(values, axis=-1)), best, NO_TOKEN)
        logs = jax.nn.log_softmax(values)
        nll = -jnp.take_along_axis(logs, following[..., None], axis=-1)[..., 0]
        if other is None:
            return nll, greedy, None, None
        values = logits(model, rows_here(other))
        same = (jnp.argmax(values, axis=-1) == greedy).astype(jnp.float32)
        return nll, greedy, jensen_shannon(logs, jax.nn.log_softmax(values)), same

    def one(rows):
        *rows, asked = rows
        if asked is None:
            return told(*rows)
        return jax.lax.cond(jnp.any(asked), lambda: told(*rows), lambda: zeros_of(told, *rows))

    x, reference = (None if a is None else split_row_groups(split(a)) for a in (x, reference))
    rows = (x, split(following), reference, None if wanted is None else split(wanted))
    parts = jax.lax.map(one, rows)
    nll, greedy, *compared = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(batch, -1)[:, :length], parts)
    after = has_next(segments)
    return jnp.where(after, nll, 0.0), greedy, *(a if a is None else jnp.where(after, a, 0.0) for a in compared)


def jensen_shannon(p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Jensen-Shannon divergence in nats (0 ... log 2) of two distributions, given as log-probabilities."""
    middle = jnp.logaddexp(p, q) - jnp.log(2.0)
    parts = (jnp.sum(jnp.exp(a) * (a - middle), axis=-1) for a in (p, q))
    return jnp.maximum(0.5 * sum(parts), 0.0)


def has_next(segments: Int[Array, "B T"]) -> Array:
    """The tokens that are followed by a token of their own document, whose prediction therefore counts."""
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return (segments > 0) & (segments == following)
