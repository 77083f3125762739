"""The order in which units are chosen, as one int32 for each unit (its image), and the choice as a list.

Every implementation chooses the units with the largest images. `reference.py` defines the same order by sorting.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.reference import seen, wanted

BARRED = np.int32(-(2**31))  # the image of what may not be chosen, below that of -inf
TOP = np.int32(2**31 - 2)  # sinks and recent tokens take the images from here down, all above that of +inf


class Selection(NamedTuple):
    """Chosen units.

    Attributes:
        indices: int32 [B, K, N], the valid ones first and ascending, the others 0.
        valid: bool [B, K, N].
    """

    indices: jax.Array
    valid: jax.Array


class Rules(NamedTuple):
    """The rules of a choice besides the scores; the fields are arguments of `select_top_k`."""

    sinks: int
    recent: int
    unit: int
    first: jax.Array | None
    threshold: jax.Array | None


def ordered_image(scores: jax.Array) -> jax.Array:
    """The int32 image of scores, which sorts as they do, between BARRED and TOP. -0 counts as 0, and NaN as -inf."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    return flip_negative(jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32))


def from_image(image: jax.Array) -> jax.Array:
    """The float32 scores whose `ordered_image` is the given int32 image; NaN where no score has it."""
    return jax.lax.bitcast_convert_type(flip_negative(image.astype(jnp.int32)), jnp.float32)


def flip_negative(bits):
    """The bits of negative numbers with all but the sign flipped. It is its own inverse."""
    return jnp.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)


def rank_image(
    scores: jax.Array,
    seen: jax.Array,
    age: jax.Array,
    position: jax.Array,
    *,
    sinks: int,
    recent: int,
    threshold: jax.Array | None = None,
) -> jax.Array:
    """The int32 image [..., S] of tokens in the order of the choice: recent ones, the newest first, sinks, then scores.

    Args:
        scores: Floats [..., S]; the other arrays broadcast against them.
        seen: bool, the tokens that may be chosen; the others are BARRED.
        age: int, how many tokens of the row are newer.
        position: int, tokens from the start of the document.
        sinks: How many of the first positions come before every score.
        recent: How many of the newest tokens come before the sinks.
        threshold: float; tokens that score below it, and are neither sink nor recent, are BARRED.
    """
    image = ordered_image(scores)
    if threshold is not None:
        image = jnp.where(image >= ordered_image(threshold), image, BARRED)
    rank = jnp.where(age < recent, age, recent + position)
    image = jnp.where((age < recent) | (position < sinks), TOP - rank, image)
    return jnp.where(seen, image, BARRED)


def contested_range(lengths, first, sinks: int, recent: int) -> tuple[jax.Array, jax.Array]:
    """The tokens that scores decide about, neither sinks nor recent: the first of them, and their end, int [B] each."""
    lengths = lengths.astype(jnp.int32)
    return jnp.maximum(jnp.zeros_like(lengths) if first is None else first, sinks), jnp.maximum(lengths - recent, 0)


def unit_image(image: jax.Array, unit: int) -> jax.Array:
    """The image of every unit, which is that of its best token: int32 [..., S] -> [..., ceil(S / unit)]."""
    if unit == 1:
        return image
    # Not by a reshape to [..., unit], which TPUs would pad to whole tiles of 128 lanes.
    span = (*[1] * (image.ndim - 1), unit)
    image = pad_barred(image, unit)
    return jax.lax.reduce_window(image, BARRED, jax.lax.max, span, span, "VALID")


def pad_barred(image: jax.Array, multiple: int) -> jax.Array:
    """The image [..., U] with BARRED entries appended, until U is a multiple of `multiple`."""
    padding = -image.shape[-1] % multiple
    return jnp.pad(image, ((0, 0),) * (image.ndim - 1) + ((0, padding),), constant_values=BARRED) if padding else image


def image_of(scores, lengths, rules: Rules):
    """The image of the units of a cache, int32 [B, K, U], from scores [B, K, S]."""
    position = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]
    age = lengths.astype(jnp.int32)[:, None, None] - 1 - position
    own = seen(scores.shape[-1], lengths, rules.first)[:, None]
    limit = None if rules.threshold is None else jnp.broadcast_to(rules.threshold, scores.shape[:2])[..., None]
    image = rank_image(scores, own, age, position, sinks=rules.sinks, recent=rules.recent, threshold=limit)
    return unit_image(image, rules.unit)


def count_of(image, size, lengths, n, counts, rules: Rules):
    """How many units are chosen, int32 [B, K], of image [B, K, U] and a cache with room for `size` tokens."""
    rows = image.shape[:2]
    if rules.threshold is not None:
        held = jnp.sum(image > BARRED, axis=-1, dtype=jnp.int32)
    else:
        end = jnp.clip(lengths.astype(jnp.int32), 0, size)
        start = jnp.zeros_like(end) if rules.first is None else jnp.clip(rules.first.astype(jnp.int32), 0, size)
        held = jnp.where(end > start, (end - 1) // rules.unit - start // rules.unit + 1, 0)
        held = jnp.broadcast_to(held[:, None], rows)
    return jnp.minimum(held, wanted(counts, n, rows))


def listed(indices, count) -> Selection:
    """The choice that consists of the first `count` [B, K] of the indices [B, K, N]."""
    valid = jnp.arange(indices.shape[-1], dtype=jnp.int32)[None, None] < count[..., None]
    return Selection(jnp.where(valid, indices, 0), valid)
