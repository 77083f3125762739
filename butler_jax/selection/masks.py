"""The choice of many queries of packed sequences, as masks over the keys: what the simulation reads.

A query attends as many of the keys it may see as its budget allows. The newest `recent` and the first `sinks` tokens of
its document come first, then the others by score. Equal scores go to the earlier token. With pages, `unit` tokens
counted from the document's start are chosen together. A page counts as its best token, and only whole pages are taken.

Under the allocation per_layer, a head may read more than its own budget. The heads of a layer together read at most the
sum of their budgets.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from butler_jax.selection.allocation import allocate
from butler_jax.selection.config import SelectionConfig
from butler_jax.selection.neighbours import add_neighbours
from butler_jax.selection.units import Units, count_units
from pallas_kernels import BARRED, TOP, from_image, ordered_image, rank_image, top_mask, unit_image


class Rows(NamedTuple):
    """Columns of query rows among the keys.

    Attributes:
        own: The query's own column.
        start: The column of the first token of its document.
    """

    own: Int[Array, "B C"]
    start: Int[Array, "B C"]

    def seen(self, sliding_window: int | None) -> Int[Array, "B C"]:
        """How many keys each row may see; 0 for a row before its document."""
        held = jnp.maximum(self.own - self.start + 1, 0)
        return held if sliding_window is None else jnp.minimum(held, sliding_window)


def always_chosen(rows: Rows, columns: Int[Array, " S"], sinks: int, recent: int) -> Bool[Array, "B C S"]:
    """The newest `recent` columns up to each query's own, and the first `sinks` of its document.

    The caller excludes columns beyond the query's own and those of other documents.
    """
    columns = columns[None, None]
    return (columns > (rows.own - recent)[..., None]) | (columns < (rows.start + sinks)[..., None])


class Pages(NamedTuple):
    """How columns lie in pages.

    Attributes:
        unit: Tokens of a page.
        position: The place of the first column in each query's document.
    """

    unit: int
    position: Int[Array, "B C"]

    @property
    def _offset(self):
        """[B, C, 1]: how many columns of the first page lie before the first column."""
        return (self.position % self.unit)[..., None]

    def image(self, tokens: Int[Array, "B K C S"]) -> Int[Array, "B K C U"]:
        """The image of every page, which is that of its best token."""
        return tokens if self.unit == 1 else unit_image(self._lay(tokens, BARRED), self.unit)

    def sums(self, tokens: Float[Array, "B K C S"]) -> Float[Array, "B K C U"]:
        """The sum of the tokens of every page."""
        if self.unit == 1:
            return tokens
        span = (*[1] * (tokens.ndim - 1), self.unit)
        return jax.lax.reduce_window(self._lay(tokens, 0.0), 0.0, jax.lax.add, span, span, "VALID")

    def _lay(self, tokens: Shaped[Array, "B K C S"], empty: float) -> Shaped[Array, "B K C _"]:
        """Values of tokens in whole pages, `empty` where a page has no column."""
        size = tokens.shape[-1]
        at = jnp.arange(-(-(size + self.unit - 1) // self.unit) * self.unit, dtype=jnp.int32)[None, None] - self._offset
        laid = jnp.take_along_axis(tokens, jnp.clip(at, 0, size - 1)[:, None], axis=-1)
        return jnp.where(((at >= 0) & (at < size))[:, None], laid, empty)

    def numbers(self, count: int) -> Int[Array, "B 1 C U"]:
        """The numbers of the first `count` pages in each query's document."""
        return ((self.position // self.unit)[..., None] + jnp.arange(count, dtype=jnp.int32)[None, None])[:, None]

    def columns(self, pages: Shaped[Array, "B K C U"], size: int) -> Shaped[Array, "B K C S"]:
        """For each of the first `size` columns the value of its page."""
        if self.unit == 1:
            return pages
        column = jnp.arange(size, dtype=jnp.int32)[None, None]
        return jnp.take_along_axis(pages, ((column + self._offset) // self.unit)[:, None], axis=-1)


def select_mask(
    scores: Float[Array, "B K C S"],
    allowed: Bool[Array, "B Q C S"],
    rows: Rows,
    tokens: Int[Array, "B C"],
    config: SelectionConfig,
    *,
    columns: Int[Array, " S"] | None = None,
    threshold: Float[Array, "#B #K #C"] | None = None,
) -> Bool[Array, "B K C S"]:
    """The keys that each query attends, per head: at most min(tokens, |allowed|) of those in `allowed`.

    Under the allocation per_layer a head may attend more. The heads together attend at most the sum of these numbers.

    Args:
        scores: float32, higher is better. -inf and NaN come last, and of equal scores the earlier token comes first.
        allowed: The keys that a query may see: causal, of its document, inside the sliding window. They are consecutive
            columns up to the query's own. The second axis is 1 or K.
        tokens: How many keys to attend, at least `config.least` or everything allowed, as `budget_table(...)[number of
            allowed keys]` gives it.
        config: Of it, sinks, recent, unit and neighbours are used; budget and threshold are given as data.
        columns: Positions of the keys, consecutive; 0 ... S-1 unless given.
        threshold: See `SelectionConfig`; any shape that broadcasts to [B, K, C].

    Returns:
        The mask, within `allowed`.
    """
    image, pages = _unit_images(scores, allowed, rows, config, columns, threshold)
    held = jnp.sum(allowed, axis=-1, dtype=jnp.int32)
    end = (rows.own - rows.start + 1)[:, None]
    units = Units(pages.numbers(image.shape[-1]), end - held, end)
    count = jnp.broadcast_to(count_units(jnp.minimum(tokens[:, None], held), units, config), image.shape[:-1])
    if threshold is not None:
        count = jnp.minimum(count, jnp.sum(image > BARRED, axis=-1, dtype=jnp.int32))
    mask = allocate(image, count, config)
    if config.neighbours:
        mask = add_neighbours(mask, units, config)
    return mask if config.unit == 1 else pages.columns(mask, scores.shape[-1]) & allowed


def best_in_unit(
    scores: Float[Array, "B K C S"],
    allowed: Bool[Array, "B Q C S"],
    rows: Rows,
    config: SelectionConfig,
    columns: Int[Array, " S"] | None = None,
) -> Float[Array, "B K C S"]:
    """For every token the best score of its unit, which `select_mask` compares; inf in units that are always read.

    Of config, sinks, recent and unit are used; the other arguments are those of `select_mask`. NaN counts as -inf.
    Tokens that a row may not see are NaN.
    """
    image, pages = _unit_images(scores, allowed, rows, config, columns, None)
    best = jnp.where(image > ordered_image(jnp.float32(jnp.inf)), jnp.inf, from_image(image))
    return pages.columns(best, scores.shape[-1])


def tied_share(
    mask: Bool[Array, "B K C S"],
    scores: Float[Array, "B K C S"],
    allowed: Bool[Array, "B Q C S"],
    rows: Rows,
    config: SelectionConfig,
    columns: Int[Array, " S"] | None = None,
) -> Float[Array, "B K C"]:
    """The share of each query's chosen units that only position tells from units left out: their scores are equal.

    mask: what `select_mask` chose; the other arguments are its own. It is 0 with neighbours, which no score chose, and
    with an interval, where other rows' scores chose.
    """
    if config.neighbours or config.interval > 1:
        return jnp.zeros(mask.shape[:-1])
    image, pages = _unit_images(scores, allowed, rows, config, columns, None)
    chosen = pages.image(jnp.where(mask, 1, BARRED)) > BARRED
    lowest = jnp.min(jnp.where(chosen, image, TOP), axis=-1, keepdims=True)
    equal = (image == lowest) & (image > BARRED)
    tied, taken = (jnp.sum(a, axis=-1, dtype=jnp.int32) for a in (equal & chosen, chosen))
    share = tied.astype(jnp.float32) / jnp.maximum(taken, 1).astype(jnp.float32)
    return jnp.where(jnp.any(equal & ~chosen, axis=-1), share, 0.0)


def _unit_images(
    scores: Float[Array, "B K C S"],
    allowed: Bool[Array, "B Q C S"],
    rows: Rows,
    config: SelectionConfig,
    columns: Int[Array, " S"] | None,
    threshold: Float[Array, "#B #K #C"] | None,
) -> tuple[Int[Array, "B K C U"], Pages]:
    """The images of the units, which sort as they are chosen, and how the columns lie in them."""
    columns = jnp.arange(scores.shape[-1], dtype=jnp.int32) if columns is None else columns
    position = columns[None, None, None] - rows.start[:, None, :, None]
    age = rows.own[:, None, :, None] - columns[None, None, None]
    limit = None if threshold is None else threshold[..., None]
    rules = dict(sinks=config.sinks, recent=config.recent, threshold=limit)
    pages = Pages(config.unit, columns[0] - rows.start)
    return pages.image(rank_image(scores, allowed, age, position, **rules)), pages


def select_best(
    scores: Float[Array, "*B S"], keys: Bool[Array, "*#B S"], count: Int[Array, "*#B"]
) -> Bool[Array, "*B S"]:
    """The mask of the `count` best of each row's keys; of equal scores the earlier one, and NaN counts as -inf.

    count: at most the number of keys of the row.
    """
    return top_mask(jnp.where(keys, ordered_image(scores), BARRED), jnp.broadcast_to(count, scores.shape[:-1]))
