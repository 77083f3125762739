"""Contested keys: the keys of a row that selection reads only if their score is high enough.

Selection always reads the first `sinks` tokens of a document and the `recent` newest tokens of a row, the row's own
token among them. All other keys that the row attends to are contested.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import attention


class KeyRange(NamedTuple):
    """Which keys a row attends to, and which of them are always read: static counts of tokens.

    sliding_window: of the layer, or None. sinks, recent: first and newest tokens that are always read. chosen: the
    budget of the second stage (second_stage.py), or None.
    """

    sliding_window: int | None
    sinks: int
    recent: int
    chosen: int | float | None = None

    @property
    def all_contested(self) -> bool:
        """Whether no key is always read."""
        return not self.sinks and not self.recent


def counted_rows(shape: tuple[int, int], segments: Int[Array, "B T"] | None, keys: KeyRange) -> Float[Array, "B T"]:
    """1 for the rows that have a contested key and are not padding, else 0."""
    columns = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    always = keys.sinks + keys.recent
    if segments is None:
        rows = columns >= always
    else:
        rows = (columns - attention.document_starts(segments) >= always) & (segments != 0)
    return (rows & (keys.sliding_window is None or keys.recent < keys.sliding_window)).astype(jnp.float32)


def contested_bounds(
    shape: tuple[int, int], segments: Int[Array, "B T"] | None, keys: KeyRange
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The first and the last contested key of each row; 1 and 0 for rows that `counted_rows` leaves out."""
    columns = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    first = keys.sinks + (jnp.zeros_like(columns) if segments is None else attention.document_starts(segments))
    if keys.sliding_window is not None:
        first = jnp.maximum(first, columns - (keys.sliding_window - 1))
    counted = counted_rows(shape, segments, keys) > 0
    return jnp.where(counted, first, 1), jnp.where(counted, columns - keys.recent, 0)


def contested_mask(
    mask: Bool[Array, "B C S"],
    index: Int[Array, ""],
    first: Int[Array, ""] | int,
    starts: Int[Array, "B T"],
    keys: KeyRange,
) -> Bool[Array, "B C S"]:
    """The mask of a chunk of query rows without the keys that are always read.

    index: of the chunk. first: position of the first key. starts: where the document of each token begins.
    """
    if keys.all_contested:
        return mask
    chunk = mask.shape[1]
    columns = (first + jnp.arange(mask.shape[2]))[None, None]
    own = (index * chunk + jnp.arange(chunk))[None, :, None]
    start = jax.lax.dynamic_slice_in_dim(starts, index * chunk, chunk, axis=1)[..., None]
    return mask & (columns <= own - keys.recent) & (columns >= start + keys.sinks)
