"""The next token from logits: greedy or drawn, row by row, so that a row's tokens do not depend on its batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from butler_jax.decoding.config import SamplingConfig


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Logits with the repetition penalty on the tokens seen."""
    weaker = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, weaker, logits)


def allowed_logits(logits: Float[Array, "B V"], sampling: SamplingConfig) -> Float[Array, "B V"]:
    """Logits less the largest, over the temperature; -inf for what top_k and top_p leave out. Ties at an edge stay in.

    What is divided is at most 0, so that a small temperature does not overflow.
    """
    logits = logits.astype(jnp.float32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    limited = sampling.top_k is not None and sampling.top_k < logits.shape[-1]
    if not limited and sampling.top_p == 1:
        return logits
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    if limited:
        ordered = jnp.where(jnp.arange(logits.shape[-1])[None] < sampling.top_k, ordered, -jnp.inf)
    weights = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights  # a token is needed while those before it fall short of p
    least = jnp.min(jnp.where((before < sampling.top_p) & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def draw(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], steps: Int[Array, "*B"], sampling: SamplingConfig
) -> Int[Array, " B"]:
    """One token a row. keys: of the rows; steps: tokens drawn before, so that every draw of a row is another."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(steps, keys.shape))
    return jax.vmap(jax.random.categorical)(keys, allowed_logits(logits, sampling)).astype(jnp.int32)


def draw_next(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    keys: Key[Array, " B"],
    steps: Int[Array, "*B"],
    sampling: SamplingConfig,
) -> tuple[Int[Array, " B"], Bool[Array, "B V"] | None]:
    """One token a row under the repetition penalty, and the tokens seen with it.

    seen: tokens that a row holds; None without a penalty. The others are as in `draw`.
    """
    if seen is None:
        return draw(logits, keys, steps, sampling), None
    token = draw(penalise(logits, seen, sampling.repetition_penalty), keys, steps, sampling)
    return token, seen.at[jnp.arange(token.shape[0]), token].set(True)
