"""Importance keys in int8, one scale a layer, row and head: a half or a quarter of the bytes that scoring reads.

A scale comes from the prompt. The first tokens do not count for it: they are attention sinks, their keys can be several
times as large as all others, and they are read whatever their score. What exceeds the scale later saturates.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.cache import ScoreCache
from butler_jax.configs import SelectionConfig, require
from pallas_kernels import quantise_score_keys

SINKS = SelectionConfig().sinks  # tokens that do not count for a scale


def store(scores: ScoreCache, lengths: Int[Array, " B"], score_dtype: str | None) -> ScoreCache:
    """A score cache filled from prompts as decoding keeps it: in int8, or as it is (None).

    Raises ValueError for another dtype.
    """
    require(score_dtype in (None, "int8"), f"score_dtype must be 'int8' or None, got {score_dtype!r}")
    if score_dtype is None:
        return scores
    held = jnp.arange(scores.keys.shape[-1])[None] < lengths[:, None]
    keys = jnp.where(held[:, None, None], scores.keys, 0)
    keys, scales = quantise_score_keys(keys, scales_of(keys, held))
    return ScoreCache(keys, scores.trunk, scales)


def write(scores: ScoreCache, new: Float[Array, "L B Q R"], lengths: Int[Array, " B"]) -> Float[Array, "L B Q R S"]:
    """The score keys with one more token a row, at its length; in int8 what exceeds the scale saturates."""
    if scores.scales is not None:
        new = quantise_score_keys(new[..., None], scores.scales)[0][..., 0]
    rows = jnp.arange(lengths.shape[0])
    return scores.keys.at[:, rows, :, :, lengths].set(jnp.swapaxes(new, 0, 1).astype(scores.keys.dtype))


def scales_of(keys: Float[Array, "*L B Q R S"], held: Bool[Array, "B S"]) -> Float[Array, "*L B Q"]:
    """What one step of int8 is worth, from the keys held by each row."""
    later = jnp.arange(held.shape[1])[None] >= SINKS
    counted = held & (later | (jnp.sum(held, axis=1, keepdims=True) <= SINKS))
    largest = jnp.max(jnp.abs(jnp.where(counted[:, None, None], keys, 0)), axis=(-2, -1))
    return largest.astype(jnp.float32) / 127


def rounded(keys: Float[Array, "B T Q R"], held: Bool[Array, "B T"]) -> Float[Array, "B T Q R"]:
    """Keys with the error of int8, as if the whole row had been the prompt."""
    turned = jnp.moveaxis(keys, 1, -1)
    whole, scales = quantise_score_keys(turned, scales_of(turned, held))
    return jnp.moveaxis(restored(whole, scales, keys.dtype), -1, 1)


def restored(keys: Array, scales: Float[Array, "*L B Q"] | None, dtype: Any = jnp.float32) -> Array:
    """Stored keys [*L, B, Q, R, S] as numbers."""
    return keys if scales is None else (keys * scales[..., None, None]).astype(dtype)
