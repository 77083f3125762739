"""From scores to chosen tokens: the only place that knows sinks, window, budget and ties.

A query attends `tokens` of the keys it may see: the newest `window` and the first `sinks` of its document
always, the rest by score. The k-th largest score is found exactly, by bisection on the order-preserving
unsigned image of float32; nothing is sorted. Ties go to the earlier token, so exactly `tokens` are chosen.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from butler_jax.configs import SelectionConfig, require

FORCED = np.uint32(0xFFFFFFFF)  # above the image of every float32: sinks and window
BARRED = np.uint32(0)  # below the image of every float32: keys that a query may not see


class Rows(NamedTuple):
    """Where query rows stand among the key columns: the query's own column, and the first of its document."""

    own: Int[Array, "B C"]
    start: Int[Array, "B C"]


def budget_tokens(config: SelectionConfig, length: int) -> int:
    """Tokens attended by a query whose dense attention would read `length` keys (t+1 at position t).

    ceil(budget * length) for a fraction, exact for the decimal or simple ratio that was written (0.1 of 10
    is 1 and 1/3 of 3 is 1, whatever their binary form), but never less than sinks + window, and never more
    than length.
    """
    return int(budget_table(config, length)[length])


def budget_table(config: SelectionConfig, length: int) -> Int[np.ndarray, " S"]:
    """budget_tokens of lengths 0 ... length, int32 [length + 1]: the budget as jitted code takes it."""
    lengths = np.arange(length + 1, dtype=np.int64)
    if isinstance(config.budget, int):
        wanted = np.full_like(lengths, config.budget)
    else:
        fraction = Fraction(repr(float(config.budget))).limit_denominator(1_000_000)
        wanted = np.maximum(-(-lengths * fraction.numerator // fraction.denominator), config.sinks + config.window)
    return np.minimum(wanted, lengths).astype(np.int32)


def ordered_bits(scores: Float[Array, "*B"]) -> UInt32[Array, "*B"]:
    """The unsigned image of float32 that keeps its order; -0 counts as 0 and NaN as the lowest score."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def top_mask(image: UInt32[Array, "*B S"], count: Int[Array, "*B"]) -> Bool[Array, "*B S"]:
    """The `count` largest entries of every row, ties to the lower index; count <= S."""
    threshold = _kth_largest(image, count)[..., None]
    mask = image >= threshold
    return jax.lax.cond(jnp.any(_size(mask) != count), lambda: _break_ties(image, threshold, count), lambda: mask)


def _size(mask: Bool[Array, "*B S"]) -> Int[Array, "*B"]:
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def _kth_largest(image: UInt32[Array, "*B S"], count: Int[Array, "*B"]) -> UInt32[Array, "*B"]:
    """The largest value that at least `count` entries reach, bit by bit from the top."""

    def body(step, found):
        trial = found | jnp.uint32(1) << (31 - step).astype(jnp.uint32)
        return jnp.where(_size(image >= trial[..., None]) >= count, trial, found)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(image.shape[:-1], jnp.uint32))


def _break_ties(image, threshold, count) -> Bool[Array, "*B S"]:
    """Everything above the threshold, and of what equals it the first ones."""
    above, equal = image > threshold, image == threshold
    missing = count - _size(above)
    size = image.shape[-1]
    columns = jnp.arange(size, dtype=jnp.int32).reshape((1,) * (image.ndim - 1) + (size,))
    steps = size.bit_length()

    def body(step, end):  # the largest end before which at most `missing` ties lie
        trial = end | jnp.int32(1) << (steps - 1 - step)
        return jnp.where(_size(equal & (columns < trial[..., None])) <= missing, trial, end)

    end = jax.lax.fori_loop(0, steps, body, jnp.zeros(count.shape, jnp.int32))
    return above | (equal & (columns < end[..., None]))


def always_chosen(rows: Rows, columns: Int[Array, " S"], sinks: int, window: int) -> Bool[Array, "B C S"]:
    """The newest `window` columns up to each query's own, and the first `sinks` of its document.

    Columns beyond the query's own, or of other documents, are for the caller to bar.
    """
    columns = columns[None, None]
    return (columns > (rows.own - window)[..., None]) | (columns < (rows.start + sinks)[..., None])


def select_mask(
    scores: Float[Array, "B K C S"],
    allowed: Bool[Array, "B Q C S"],
    rows: Rows,
    tokens: Int[Array, "B C"],
    *,
    sinks: int = 4,
    window: int = 8,
    columns: Int[Array, " S"] | None = None,
) -> Bool[Array, "B K C S"]:
    """The keys that each query attends, per head: min(tokens, |allowed|) of those in `allowed`.

    scores: float32, higher is better; -inf and NaN come last. allowed: causal, same document, inside a
    sliding window; the second axis is 1 or K. rows: see Rows. tokens: how many keys to attend, at least sinks +
    window or everything allowed, as `budget_table(...)[number of allowed keys]` gives it. columns: positions of the
    keys, 0 ... S-1 unless given.
    """
    columns = jnp.arange(scores.shape[-1]) if columns is None else columns
    tokens = jnp.minimum(tokens[:, None], _size(allowed))  # [B, Q, C]
    forced = always_chosen(rows, columns, sinks, window)[:, None]
    image = jnp.where(forced, FORCED, ordered_bits(scores))
    image = jnp.where(allowed, image, BARRED)
    return top_mask(image, jnp.broadcast_to(tokens, image.shape[:-1]))


def select(
    scores: Float[Array, "B K C S"], allowed: Bool[Array, "B Q C S"], rows: Rows, config: SelectionConfig
) -> Bool[Array, "B K C S"]:
    """select_mask under a configuration: its budget of the keys each row may see.

    allowed must be the same for every head (second axis 1). Raises ValueError where it is not.
    """
    require(
        allowed.shape[1] == 1,
        f"select needs one set of allowed keys a row, got {allowed.shape[1]} heads of them",
    )
    table = jnp.asarray(budget_table(config, scores.shape[-1]))
    tokens = table[_size(allowed)[:, 0]]
    return select_mask(scores, allowed, rows, tokens, sinks=config.sinks, window=config.window)
