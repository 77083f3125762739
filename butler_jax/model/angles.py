"""The rotary angles of tokens in every layer of a model."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.model.config import BaseConfig, RopeConfig
from butler_jax.model.layers import rope_frequencies, rotary_angles


class RotaryAngles(NamedTuple):
    """Rotary cosine and sine of tokens, for each of the N kinds of layers that a model has (F = rotary_dim/2).

    Attributes:
        cos, sin: Of every kind; 1 and 0 for layers without rotary embedding.
        kinds: The kind of every layer; None where all are of one kind.
    """

    cos: Float[Array, "N B T F"]
    sin: Float[Array, "N B T F"]
    kinds: Int[np.ndarray, " L"] | None

    def of(self, layer: Int[Array, ""] | int) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
        """Cosine and sine in a layer."""
        kind = 0 if self.kinds is None else jnp.asarray(self.kinds)[layer]
        return self.cos[kind], self.sin[kind]


def rope_angles(
    config: BaseConfig,
    positions: Int[Array, "B T"],
    length: Int[Array, " B"] | int | None = None,
    near: Int[Array, "B T"] | None = None,
) -> RotaryAngles:
    """Rotary cosine and sine of a model at these positions.

    Args:
        length: Tokens of each row, by which longrope takes its short or its long factors; default those up to the
            row's last position.
        near: Positions in `BaseConfig.near_layers`. Where `positions` skip some, these must not: a sliding window
            reaches back over tokens. Default: `positions`.
    """
    if length is None:
        length = jnp.max(positions, axis=1) + 1
    apart = (False,) * config.layers if near is None else config.near_layers
    layers = list(zip(config.layer_ropes, apart, strict=True))
    kinds = list(dict.fromkeys(layers))
    found = [_angles(config, rope, near if own else positions, length) for rope, own in kinds]
    cos, sin = (jnp.stack(parts) for parts in zip(*found, strict=True))
    return RotaryAngles(cos, sin, np.array([kinds.index(kind) for kind in layers]) if len(kinds) > 1 else None)


def _angles(config, rope: RopeConfig | None, positions, length) -> tuple[Array, Array]:
    if rope is None:
        shape = (*positions.shape, config.rotary_dim // 2)
        return jnp.ones(shape), jnp.zeros(shape)

    def angles(length):
        return rotary_angles(
            positions, *rope_frequencies(rope, config.rotary_dim, context=config.context, length=length)
        )

    border = rope.border
    if border is None:
        return angles(0)
    beyond = jnp.broadcast_to(jnp.asarray(length) > border, positions.shape[:1])[:, None, None]
    (short_cos, short_sin), (long_cos, long_sin) = angles(border), angles(border + 1)
    return jnp.where(beyond, long_cos, short_cos), jnp.where(beyond, long_sin, short_sin)
