"""k_imp of the cached tokens, as the predictor makes it or in int8.

int8 reads a half or a quarter of the bytes. It has one scale for each layer, row and head, found on the prompt: the
largest element, and at least WIDE times the root mean square, since a short prompt has not seen the largest yet. The
sinks do not count: their keys can be several times as large as all others, and they are read whatever their score.
Later keys that exceed the scale saturate. A row without a prompt has a scale of 0. All its keys are then equal, and the
earliest are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from butler_jax.decoding.store import write_token
from butler_jax.model import BaseConfig
from butler_jax.selection import SelectionConfig
from pallas_kernels import quantise_k_imp

SINKS = SelectionConfig().sinks  # tokens that do not count for a scale
WIDE = 5.0
SCORE_LETTERS = "-bh-s"  # dimensions of k_imp, as parallel.by_rows_and_heads names them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreCache:
    """k_imp of the layers of `layers_scored`, the cached tokens in the minor dimension; layer 0's is unused.

    Attributes:
        k_imp: As the predictor makes it, or in int8.
        trunk: Cache of a predictor's own attention, stacked over producers; None where it has none.
        scales: Value of one step of int8; None where k_imp is float.
    """

    k_imp: Float[Array, "L B Q R S"] | Int[Array, "L B Q R S"]
    trunk: Any = None
    scales: Float[Array, "L B Q"] | None = None


def layers_scored(base: BaseConfig) -> list[int]:
    """The layers of a score cache: 0, and those that are served."""
    return [0, *base.served_layers]


def place_scored(base: BaseConfig, layer: Int[Array, "*P"]) -> Int[Array, "*P"]:
    """Where a score cache has a layer; 0 for those that are not served."""
    return jnp.asarray(np.cumsum(base.served) * base.served, jnp.int32)[layer] if base.mixed else layer


def select_scored(base: BaseConfig, found: Shaped[Array, "L ..."]) -> Shaped[Array, "_ ..."]:
    """What was found in every layer, of the layers of a score cache."""
    return found[np.asarray(layers_scored(base))] if base.mixed else found


def check_score_dtype(score_dtype: str | None) -> None:
    """Raise ValueError for a dtype that k_imp cannot be kept in."""
    if score_dtype not in (None, "int8"):
        raise ValueError(f"score_dtype must be 'int8' or None, got {score_dtype!r}")


def store_scores(scores: ScoreCache, lengths: Int[Array, " B"], score_dtype: str | None) -> ScoreCache:
    """A score cache filled from prompts as decoding keeps it: in int8, or as it is (None)."""
    if score_dtype is None:
        return scores
    held = jnp.arange(scores.k_imp.shape[-1])[None] < lengths[:, None]
    k_imp = jnp.where(held[:, None, None], scores.k_imp, 0)
    k_imp, scales = quantise_k_imp(k_imp, scales_of(k_imp, held))
    return ScoreCache(k_imp, scores.trunk, scales)


def append_scores(
    scores: ScoreCache, new: Float[Array, "L B Q R"], lengths: Int[Array, " B"], trunk: Any
) -> ScoreCache:
    """The score cache with one more token a row, at its length, and the trunk's new cache."""
    if scores.scales is not None:
        new = quantise_k_imp(new[..., None], scores.scales)[0][..., 0]
    return replace(scores, k_imp=write_token(scores.k_imp, new, lengths, SCORE_LETTERS), trunk=trunk)


def scales_of(k_imp: Float[Array, "*L B Q R S"], held: Bool[Array, "B S"]) -> Float[Array, "*L B Q"]:
    """What one step of int8 is worth, from the tokens held by each row. Numbers that are not finite count as 0."""
    later = jnp.cumsum(held, axis=1) > SINKS
    counted = held & (later | (jnp.sum(held, axis=1, keepdims=True) <= SINKS))
    k_imp = jnp.where(jnp.isfinite(k_imp), k_imp, 0)
    k_imp = jnp.where(counted[:, None, None], k_imp, 0).astype(jnp.float32)
    elements = jnp.maximum(jnp.sum(counted, axis=1), 1).astype(jnp.float32) * k_imp.shape[-2]
    elements = elements.reshape((1,) * (k_imp.ndim - 4) + (-1, 1))
    spread = jnp.sqrt(jnp.sum(jnp.square(k_imp), axis=(-2, -1)) / elements)
    return jnp.maximum(jnp.max(jnp.abs(k_imp), axis=(-2, -1)), WIDE * spread) / 127


def rounded(k_imp: Float[Array, "B T Q R"], held: Bool[Array, "B T"]) -> Float[Array, "B T Q R"]:
    """Return k_imp with the error of int8, as if the whole row had been the prompt."""
    turned = jnp.moveaxis(k_imp, 1, -1)
    whole, scales = quantise_k_imp(turned, scales_of(turned, held))
    return jnp.moveaxis(restored(whole, scales, k_imp.dtype), -1, 1)


def restored(k_imp: Array, scales: Float[Array, "*L B Q"] | None, dtype: Any = jnp.float32) -> Array:
    """A stored k_imp [*L, B, Q, R, S] as numbers."""
    return k_imp if scales is None else (k_imp * scales[..., None, None]).astype(dtype)
