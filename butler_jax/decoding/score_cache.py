"""Importance keys in int8, one scale a layer, row and head: a half or a quarter of the bytes that scoring reads.

A scale comes from the prompt: its largest element, and no less than WIDE times the root mean square, for a short prompt
has not seen the largest yet. The first tokens do not count: they are attention sinks, their keys can be several times
as large as all others, and they are read whatever their score. What exceeds the scale later saturates. A row without a
prompt has a scale of 0, so that all its keys are equal: the earliest are read.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding.cache import ScoreCache, write_token
from butler_jax.selection import SelectionConfig
from pallas_kernels import quantise_k_imp

SINKS = SelectionConfig().sinks  # tokens that do not count for a scale
WIDE = 5.0


def check_score_dtype(score_dtype: str | None) -> None:
    """Raise ValueError for what keys cannot be kept in."""
    if score_dtype not in (None, "int8"):
        raise ValueError(f"score_dtype must be 'int8' or None, got {score_dtype!r}")


def store(scores: ScoreCache, lengths: Int[Array, " B"], score_dtype: str | None) -> ScoreCache:
    """A score cache filled from prompts as decoding keeps it: in int8, or as it is (None)."""
    if score_dtype is None:
        return scores
    held = jnp.arange(scores.k_imp.shape[-1])[None] < lengths[:, None]
    keys = jnp.where(held[:, None, None], scores.k_imp, 0)
    keys, scales = quantise_k_imp(keys, scales_of(keys, held))
    return ScoreCache(keys, scores.trunk, scales)


def write(scores: ScoreCache, new: Float[Array, "L B Q R"], lengths: Int[Array, " B"]) -> Float[Array, "L B Q R S"]:
    """The score keys with one more token a row, at its length; in int8 what exceeds the scale saturates."""
    if scores.scales is not None:
        new = quantise_k_imp(new[..., None], scores.scales)[0][..., 0]
    return write_token(scores.k_imp, new, lengths, "-bh-s")


def scales_of(keys: Float[Array, "*L B Q R S"], held: Bool[Array, "B S"]) -> Float[Array, "*L B Q"]:
    """What one step of int8 is worth, from the keys held by each row."""
    later = jnp.arange(held.shape[1])[None] >= SINKS
    counted = held & (later | (jnp.sum(held, axis=1, keepdims=True) <= SINKS))
    keys = jnp.where(counted[:, None, None], keys, 0).astype(jnp.float32)
    elements = jnp.maximum(jnp.sum(counted, axis=1), 1).astype(jnp.float32) * keys.shape[-2]
    elements = elements.reshape((1,) * (keys.ndim - 4) + (-1, 1))
    spread = jnp.sqrt(jnp.sum(jnp.square(keys), axis=(-2, -1)) / elements)
    return jnp.maximum(jnp.max(jnp.abs(keys), axis=(-2, -1)), WIDE * spread) / 127


def rounded(keys: Float[Array, "B T Q R"], held: Bool[Array, "B T"]) -> Float[Array, "B T Q R"]:
    """Keys with the error of int8, as if the whole row had been the prompt."""
    turned = jnp.moveaxis(keys, 1, -1)
    whole, scales = quantise_k_imp(turned, scales_of(turned, held))
    return jnp.moveaxis(restored(whole, scales, keys.dtype), -1, 1)


def restored(keys: Array, scales: Float[Array, "*L B Q"] | None, dtype: Any = jnp.float32) -> Array:
    """Stored keys [*L, B, Q, R, S] as numbers."""
    return keys if scales is None else (keys * scales[..., None, None]).astype(dtype)
