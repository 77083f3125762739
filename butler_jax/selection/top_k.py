"""Exact top-k without sorting: the k-th largest by bisection on bits, ties by position, compaction by ranks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


def ordered_bits(scores: Float[Array, "*B"]) -> UInt32[Array, "*B"]:
    """The unsigned image of float32 that keeps its order; -0 counts as 0 and NaN as the lowest score."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def from_bits(image: UInt32[Array, "*B"]) -> Float[Array, "*B"]:
    """The float32 whose `ordered_bits` is the image."""
    bits = jnp.where(image >> 31 == 1, image & jnp.uint32(0x7FFFFFFF), ~image)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def top_mask(image: UInt32[Array, "*B S"], count: Int[Array, "*B"]) -> Bool[Array, "*B S"]:
    """The `count` largest entries of every row, ties to the lower index; count <= S."""
    threshold = _kth_largest(image, count)[..., None]
    mask = image >= threshold
    return jax.lax.cond(jnp.any(set_size(mask) != count), lambda: _break_ties(image, threshold, count), lambda: mask)


def set_size(mask: Bool[Array, "*B S"]) -> Int[Array, "*B"]:
    """How many entries of each row are set."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def _kth_largest(image: UInt32[Array, "*B S"], count: Int[Array, "*B"]) -> UInt32[Array, "*B"]:
    """The largest value that at least `count` entries reach, bit by bit from the top."""

    def body(step, found):
        trial = found | jnp.uint32(1) << (31 - step).astype(jnp.uint32)
        return jnp.where(set_size(image >= trial[..., None]) >= count, trial, found)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(image.shape[:-1], jnp.uint32))


def _break_ties(image, threshold, count) -> Bool[Array, "*B S"]:
    """Everything above the threshold, and of what equals it the first ones."""
    above, equal = image > threshold, image == threshold
    missing = count - set_size(above)
    size = image.shape[-1]
    columns = jnp.arange(size, dtype=jnp.int32).reshape((1,) * (image.ndim - 1) + (size,))
    steps = size.bit_length()

    def body(step, end):  # the largest end before which at most `missing` ties lie
        trial = end | jnp.int32(1) << (steps - 1 - step)
        return jnp.where(set_size(equal & (columns < trial[..., None])) <= missing, trial, end)

    end = jax.lax.fori_loop(0, steps, body, jnp.zeros(count.shape, jnp.int32))
    return above | (equal & (columns < end[..., None]))


def right_of_runs(mask: Bool[Array, "*B U"]) -> Bool[Array, "*B U"]:
    """For every run of c set entries, the c entries to its right: of {3, 4, 9} it is {5, 6, 10}."""
    at = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    before = jax.lax.cummax(jnp.where(mask, -1, at), axis=mask.ndim - 1)  # the last entry that is not set
    last = mask & ~jnp.pad(mask[..., 1:], ((0, 0),) * (mask.ndim - 1) + ((0, 1),))
    reach = jax.lax.cummax(jnp.where(last, 2 * at - before, -1), axis=mask.ndim - 1)
    return ~mask & (reach >= at)


class Chosen(NamedTuple):
    """Units of a cache that rows attend: int32, the valid ones first and ascending, the others 0."""

    indices: Int[Array, "B K N"]
    valid: Bool[Array, "B K N"]


def compact(mask: Bool[Array, "B K U"], room: int) -> Chosen:
    """The positions of the first `room` entries that are set."""
    batch, heads, units = mask.shape
    mask = mask.reshape(batch * heads, units)
    place = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    row = jnp.arange(batch * heads, dtype=jnp.int32)[:, None]
    position = jnp.broadcast_to(jnp.arange(units, dtype=jnp.int32)[None], mask.shape)
    indices = jnp.zeros((batch * heads, room), jnp.int32)
    indices = indices.at[row, jnp.where(mask, place - 1, room + position)].set(
        position, mode="drop", unique_indices=True
    )
    valid = jnp.arange(room, dtype=jnp.int32)[None] < place[:, -1:]
    return Chosen(indices.reshape(batch, heads, room), valid.reshape(batch, heads, room))
