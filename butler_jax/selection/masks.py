"""From scores to chosen tokens: the only place that knows sinks, recent, budget, pages and ties.

A query attends `tokens` of the keys it may see: the newest `recent` and the first `sinks` of its document
always, the rest by score. The k-th largest score is found exactly (top_k.py); ties go to the earlier token, so
exactly `tokens` are chosen.

With pages, the unit of choice is `unit` tokens counted from the document's start, a page is as good as its best token,
and whole pages are taken as long as they fit. `select_mask` chooses for many queries of packed sequences,
`choose` for the newest token of each row: both through `select_units`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from butler_jax.selection.budget import beyond, budget_table
from butler_jax.selection.config import SelectionConfig
from butler_jax.selection.top_k import Chosen, compact, ordered_bits, right_of_runs, set_size, top_mask

FORCED = np.uint32(0xFFFFFFFF)  # above the image of every float32: sinks and recent
BARRED = np.uint32(0)  # below the image of every float32: keys that a query may not see


class Rows(NamedTuple):
    """Where query rows stand among the key columns: the query's own column, and the first of its document."""

    own: Int[Array, "B C"]
    start: Int[Array, "B C"]


def always_chosen(rows: Rows, columns: Int[Array, " S"], sinks: int, recent: int) -> Bool[Array, "B C S"]:
    """The newest `recent` columns up to each query's own, and the first `sinks` of its document.

    Columns beyond the query's own, or of other documents, are for the caller to bar.
    """
    columns = columns[None, None]
    return (columns > (rows.own - recent)[..., None]) | (columns < (rows.start + sinks)[..., None])


class Pages(NamedTuple):
    """How keys lie in pages: of `unit` tokens, the first one beginning `offset` keys before the first column.

    offset: 0 ... unit - 1 for each query, or None where every query's pages begin at column 0.
    """

    unit: int
    offset: Int[Array, "B C"] | None

    def of(self, image: UInt32[Array, "B K C S"]) -> UInt32[Array, "B K C U"]:
        """The largest entry of every page."""
        size, unit = image.shape[-1], self.unit
        if unit == 1:
            return image
        if self.offset is None:
            image = jnp.pad(image, ((0, 0),) * 3 + ((0, -size % unit),))
        else:
            at = jnp.arange(-(-(size + unit - 1) // unit) * unit, dtype=jnp.int32)[None, None] - self.offset[..., None]
            image = jnp.take_along_axis(image, jnp.clip(at, 0, size - 1)[:, None], axis=-1)
            image = jnp.where(((at >= 0) & (at < size))[:, None], image, BARRED)
        return jnp.max(image.reshape(*image.shape[:3], -1, unit), axis=-1)

    def tokens(self, mask: Bool[Array, "B K C U"], size: int) -> Bool[Array, "B K C S"]:
        """Every column of the pages in the mask."""
        if self.unit == 1:
            return mask
        column = jnp.arange(size, dtype=jnp.int32)[None, None]
        offset = jnp.zeros((1, 1), jnp.int32) if self.offset is None else self.offset
        return jnp.take_along_axis(mask, ((column + offset[..., None]) // self.unit)[:, None], axis=-1)


def select_units(
    image: UInt32[Array, "B K C S"],
    rows: Rows,
    tokens: Int[Array, "B Q C"],
    allowed: Int[Array, "B Q C"],
    pages: Pages,
    threshold: Float[Array, "B K C"] | None = None,
    neighbours: bool = False,
) -> Bool[Array, "B K C U"]:
    """The units each query attends.

    image: FORCED, BARRED, or ordered_bits of a score. allowed: how many of a row are not BARRED. The newest page may be
    partly filled: n pages hold (n - 1) * unit tokens and those of the newest one at most, and n is the most for which
    they are within `tokens`. threshold: see SelectionConfig, of any shape that broadcasts.
    """
    shape = image.shape[:-1]
    units = pages.of(image)
    everything = tokens >= allowed
    count = unit_counts(tokens, allowed, (rows.own - rows.start)[:, None], pages.unit)
    count = jnp.broadcast_to(count, shape)
    if pages.unit > 1 or threshold is not None or neighbours:
        forced = set_size(units == FORCED)
        count = jnp.maximum(count, forced)
        if neighbours:
            count = jnp.where(everything, count, forced + (count - forced) // 2)
        if threshold is not None:
            limit = jnp.broadcast_to(ordered_bits(threshold), shape)
            count = jnp.minimum(count, jnp.maximum(set_size(units >= limit[..., None]), forced))
        mask = top_mask(units, count)
        if neighbours:
            # Half of the room at most was filled, and as many neighbours at most come: never more than the room.
            mask = mask | (right_of_runs(mask & (units != FORCED)) & (units != BARRED))
        return mask
    return top_mask(units, count)


def unit_counts(
    tokens: Int[Array, "*B"], allowed: Int[Array, "*B"], own: Int[Array, "*B"], unit: int
) -> Int[Array, "*B"]:
    """The most units whose tokens are within a budget: of `allowed` tokens in a row, the newest at position `own`."""
    if unit == 1:
        return tokens
    newest = jnp.minimum(own % unit + 1, allowed)
    whole = own // unit - (own - allowed + 1) // unit + 1
    return jnp.where(tokens >= allowed, whole, 1 + (tokens - newest) // unit)


def select_mask(
    scores: Float[Array, "B K C S"],
    allowed: Bool[Array, "B Q C S"],
    rows: Rows,
    tokens: Int[Array, "B C"],
    *,
    sinks: int = 4,
    recent: int = 8,
    columns: Int[Array, " S"] | None = None,
    unit: int = 1,
    threshold: Float[Array, "B K C"] | None = None,
    neighbours: bool = False,
) -> Bool[Array, "B K C S"]:
    """The keys that each query attends, per head: min(tokens, |allowed|) of those in `allowed`, or fewer.

    scores: float32, higher is better; -inf and NaN come last, equal ones in their order along the row, so that equal
    scores give the earliest tokens beside sinks and recent. allowed: causal, same document, inside a
    sliding window, so consecutive columns up to the query's own; the second axis is 1 or K. rows: see Rows. tokens: how
    many keys to attend, at least SelectionConfig.least or everything allowed, as `budget_table(...)[number of allowed
    keys]` gives it. columns: positions of the keys, consecutive, 0 ... S-1 unless given. unit, threshold, neighbours:
    see SelectionConfig; the threshold in any shape that broadcasts to [B, K, C].
    """
    columns = jnp.arange(scores.shape[-1]) if columns is None else columns
    size = set_size(allowed)
    tokens = jnp.minimum(tokens[:, None], size)  # [B, Q, C]
    forced = always_chosen(rows, columns, sinks, recent)[:, None]
    image = jnp.where(forced, FORCED, ordered_bits(scores))
    image = jnp.where(allowed, image, BARRED)
    pages = Pages(unit, None if unit == 1 else (columns[0] - rows.start) % unit)
    mask = select_units(image, rows, tokens, size, pages, threshold, neighbours)
    return mask if unit == 1 else pages.tokens(mask, scores.shape[-1]) & allowed


def select(
    scores: Float[Array, "B K C S"],
    allowed: Bool[Array, "B Q C S"],
    rows: Rows,
    config: SelectionConfig,
    threshold: Float[Array, "B K C"] | None = None,
) -> Bool[Array, "B K C S"]:
    """select_mask under a configuration: its budget of the keys each row may see.

    threshold: of this layer, where the configuration has them. allowed must be the same for every head (second axis 1).
    Raises ValueError where it is not.
    """
    if allowed.shape[1] != 1:
        raise ValueError(f"select needs one set of allowed keys a row, got {allowed.shape[1]} heads of them")
    table = jnp.asarray(budget_table(config, scores.shape[-1]))
    count = set_size(allowed)[:, 0]
    tokens = table[count]
    threshold = beyond(config.min_context, count[:, None], threshold)
    return select_mask(
        scores, allowed, rows, tokens, sinks=config.sinks, recent=config.recent, unit=config.unit,
        threshold=threshold, neighbours=config.neighbours,
    )  # fmt: skip


def choose(
    scores: Float[Array, "B K S"],
    lengths: Int[Array, " B"],
    tokens: Int[Array, " B"],
    room: int,
    config: SelectionConfig,
    *,
    threshold: Float[Array, "B K"] | None = None,
    first: Int[Array, " B"] | None = None,
    top_k: Callable[..., tuple[Array, Array]] | None = None,
) -> Chosen:
    """The units that the newest token of each row attends, itself included, as `select_mask` would choose them.

    scores: of the cached tokens, ordered as in `select_mask`; the newest one's is not looked at (it is in the recent).
    lengths: tokens of each row, the newest included; a row of 0 chooses nothing. tokens: its budget, as budget_table
    gives it. room: slots(config, the largest of tokens).
    threshold: of this layer. first: the first token a row may see (a sliding window), 0 unless given. top_k: a faster
    form of the same choice, with the arguments and the result of pallas_kernels.select_top_k; neighbours do without.
    """
    if top_k is not None and not config.neighbours:
        held = lengths if first is None else lengths - first
        counts = unit_counts(jnp.minimum(tokens, held), held, lengths - 1, config.unit)
        forced = dict(sinks=config.sinks, recent=config.recent)
        return Chosen(
            *top_k(scores, lengths, room, counts=counts, unit=config.unit, first=first, threshold=threshold, **forced)
        )
    size = scores.shape[-1]
    start = jnp.zeros_like(lengths) if first is None else first
    columns = jnp.arange(size, dtype=jnp.int32)
    rows = Rows((lengths - 1)[:, None], jnp.zeros_like(lengths)[:, None])
    image = jnp.where(
        always_chosen(rows, columns, config.sinks, config.recent)[:, None], FORCED, ordered_bits(scores)[:, :, None]
    )
    inside = (columns[None] < lengths[:, None]) & (columns[None] >= start[:, None])
    image = jnp.where(inside[:, None, None], image, BARRED)
    held = (lengths - start)[:, None, None]
    tokens = jnp.minimum(tokens[:, None, None], held)
    if threshold is not None:
        threshold = threshold[..., None]
    mask = select_units(image, rows, tokens, held, Pages(config.unit, None), threshold, config.neighbours)
    return compact(mask[:, :, 0], room)
