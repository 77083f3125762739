"""The next token from logits: greedy or drawn, row by row, so that a row's tokens do not depend on its batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from butler_jax.decoding.config import SamplingConfig


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_k", "top_p", "repetition_penalty"),
    meta_fields=("greedy", "limited", "penalised"),
)
@dataclass(frozen=True)
class Draws:
    """A `SamplingConfig` as compiled code takes it: numbers are data, so other numbers compile nothing anew.

    Attributes:
        temperature: Above 0.
        top_k: The largest int32 for all tokens.
        top_p: inf for all tokens.
        repetition_penalty: 1 without one.
        greedy: Whether the most likely token is taken.
        limited: Whether top_k or top_p leaves tokens out.
        penalised: Whether there is a repetition penalty.
    """

    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    repetition_penalty: np.float32
    greedy: bool
    limited: bool
    penalised: bool

    @classmethod
    def of(cls, sampling: SamplingConfig) -> Draws:
        """The draws of a configuration."""
        smallest, most = np.finfo(np.float32).tiny, np.iinfo(np.int32).max
        top_k, top_p = sampling.top_k, sampling.top_p
        return cls(
            temperature=np.maximum(np.float32(sampling.temperature), smallest),
            top_k=np.int32(most if top_k is None else min(top_k, most)),
            top_p=np.float32(top_p if top_p < 1 else np.inf),
            repetition_penalty=np.float32(sampling.repetition_penalty),
            greedy=sampling.temperature == 0,
            limited=top_k is not None or top_p < 1,
            penalised=sampling.repetition_penalty != 1,
        )


GREEDY = Draws.of(SamplingConfig())


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | float
) -> Float[Array, "B V"]:
    """Logits with the repetition penalty on the tokens seen."""
    weaker = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, weaker, logits)


def allowed_logits(logits: Float[Array, "B V"], draws: Draws) -> Float[Array, "B V"]:
    """Logits less the largest, over the temperature; -inf for what top_k and top_p leave out. Ties at an edge stay in.

    What is divided is at most 0, so that a small temperature does not overflow.
    """
    logits = logits.astype(jnp.float32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / draws.temperature
    if not draws.limited:
        return logits
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    ordered = jnp.where(jnp.arange(logits.shape[-1])[None] < draws.top_k, ordered, -jnp.inf)
    weights = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights  # a token is needed while those before it fall short of p
    least = jnp.min(jnp.where((before < draws.top_p) & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def draw(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], steps: Int[Array, "*B"], draws: Draws
) -> Int[Array, " B"]:
    """One token a row. keys: of the rows; steps: tokens drawn before, so that every draw of a row is another."""
    if draws.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(steps, keys.shape))
    return jax.vmap(jax.random.categorical)(keys, allowed_logits(logits, draws)).astype(jnp.int32)


def draw_next(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    keys: Key[Array, " B"],
    steps: Int[Array, "*B"],
    draws: Draws,
) -> tuple[Int[Array, " B"], Bool[Array, "B V"] | None]:
    """One token a row under the repetition penalty, and the tokens seen with it.

    seen: tokens that a row holds; None without a penalty. The others are as in `draw`.
    """
    if seen is None:
        return draw(logits, keys, steps, draws), None
    token = draw(penalise(logits, seen, draws.repetition_penalty), keys, steps, draws)
    return token, seen.at[jnp.arange(token.shape[0]), token].set(True)
