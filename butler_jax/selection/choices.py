"""Choices of units for the newest token of each row: to make one, keep it for later steps, and count its tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.selection.allocation import allocate
from butler_jax.selection.config import SelectionConfig
from butler_jax.selection.neighbours import add_neighbours
from butler_jax.selection.units import Units, count_units
from pallas_kernels import Rules, compact, image_of
from pallas_kernels import Selection as Chosen


def choose(
    select: Callable[..., Chosen],
    size: int,
    lengths: Int[Array, " B"],
    tokens: Int[Array, " B"],
    room: int,
    config: SelectionConfig,
    *,
    counts: Int[Array, "B K"] | None = None,
    threshold: Float[Array, "B K"] | None = None,
    first: Int[Array, " B"] | None = None,
    implementation: str | None = None,
) -> Chosen:
    """The units that the newest token of each row attends, itself included, as `select_mask` would choose them.

    Args:
        select: `select_top_k` of scores, or `choose_by_importance` of q_imp and k_imp. It is given the arguments that
            follow lengths. The newest token's score does not matter: it is recent.
        size: Tokens that the cache has room for.
        lengths: Tokens of each row, the newest included. A row of 0 chooses nothing.
        tokens: The budget of each row, as `budget_table` gives it.
        room: N, units that are listed for each row and KV head; see `room_for`.
        config: Of it, sinks, recent, unit and neighbours are used; budget and threshold are given as data.
        counts: Units of each head, as `share_counts` gives them; None: those of the budget.
        threshold: The lowest score that is read, of this layer.
        first: The first token that a row may see, under a sliding window; 0 unless given.
    """
    units = _units_of(size, lengths, first, config)
    rules = dict(sinks=config.sinks, recent=config.recent, unit=config.unit, first=first, threshold=threshold)
    if counts is None:
        counts = count_units(jnp.minimum(tokens, units.held), units, config)
    chosen = select(room, counts=counts, implementation=implementation, **rules)
    if not config.neighbours:
        return chosen
    of_heads = Units(*(a[:, None] for a in units))
    return compact(add_neighbours(_unit_mask(chosen, units.number.shape[-1]), of_heads, config), room)


def share_counts(
    scores: Float[Array, "B K S"],
    lengths: Int[Array, " B"],
    tokens: Int[Array, " B"],
    config: SelectionConfig,
    first: Int[Array, " B"] | None = None,
) -> Int[Array, "B K"]:
    """The units that each head reads where the heads of a layer share their reads, as `select_mask` shares them.

    scores: Of the cached tokens. The other arguments are those of `choose`.
    """
    image = image_of(scores, lengths, Rules(config.sinks, config.recent, config.unit, first, None))
    units = _units_of(scores.shape[-1], lengths, first, config)
    counts = count_units(jnp.minimum(tokens, units.held), units, config)
    mask = allocate(image, jnp.broadcast_to(counts[:, None], image.shape[:2]), config)
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def _units_of(size: int, lengths: Int[Array, " B"], first: Int[Array, " B"] | None, config: SelectionConfig) -> Units:
    """All units of a cache, for rows of these lengths."""
    number = jnp.arange(-(-size // config.unit), dtype=jnp.int32)[None]
    return Units(number, jnp.zeros_like(lengths) if first is None else first, lengths)


def _unit_mask(chosen: Chosen, units: int) -> Bool[Array, "B K U"]:
    """The chosen units as a mask."""
    batch, heads, _ = chosen.indices.shape
    place = (jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None])
    mask = jnp.zeros((batch, heads, units), bool)
    return mask.at[(*place, jnp.where(chosen.valid, chosen.indices, units))].set(True, mode="drop")


def kept(chosen: Chosen, lengths: Int[Array, " B"], config: SelectionConfig) -> Chosen:
    """The choice without its recent units, for the steps up to the next choice."""
    low = jnp.maximum(lengths - config.recent, 0) // config.unit
    valid = chosen.valid & (chosen.indices < low[:, None, None])
    return Chosen(jnp.where(valid, chosen.indices, 0), valid)


def with_recent(
    keep: Chosen, since: Int[Array, ""], lengths: Int[Array, " B"], config: SelectionConfig, capacity: int
) -> Chosen:
    """A choice from `kept`, made `since` steps ago, with the units of what was recent then and of all tokens since."""
    batch, heads, _ = keep.indices.shape
    low = jnp.maximum(lengths - since - config.recent, 0)
    room = (config.recent + config.interval + config.unit - 3) // config.unit + 1
    units = low[:, None] // config.unit + jnp.arange(room, dtype=jnp.int32)[None]
    valid = units <= ((lengths - 1) // config.unit)[:, None]
    recent = (jnp.where(valid, units, 0), valid)
    recent = (jnp.broadcast_to(a[:, None], (batch, heads, room)) for a in recent)
    indices, valid = (jnp.concatenate(pair, axis=-1) for pair in zip(keep, recent, strict=True))
    most = -(-capacity // config.unit)
    if indices.shape[-1] > most:  # more room than the cache has units: close the gaps
        order = jnp.argsort(~valid, axis=-1, stable=True)[..., :most]
        indices, valid = (jnp.take_along_axis(a, order, axis=-1) for a in (indices, valid))
    return Chosen(indices, valid)


def attended_tokens(
    chosen: Chosen, lengths: Int[Array, " B"], first: Int[Array, " B"] | None, unit: int
) -> Int[Array, "B K"]:
    """How many of the tokens first ... lengths - 1 the chosen units of `unit` tokens hold."""
    begin = chosen.indices * unit
    end = jnp.minimum(begin + unit, lengths[:, None, None])
    if first is not None:
        begin = jnp.maximum(begin, first[:, None, None])
    return jnp.sum(jnp.where(chosen.valid, jnp.maximum(end - begin, 0), 0), axis=-1)


def chosen_tokens(
    chosen: Chosen, lengths: Int[Array, " B"], first: Int[Array, " B"] | None, unit: int, capacity: int
) -> Bool[Array, "B K S"]:
    """The tokens of first ... lengths - 1 that the chosen units hold, as a mask over the cache."""
    mask = _unit_mask(chosen, -(-capacity // unit))
    mask = jnp.repeat(mask, unit, axis=-1)[..., :capacity]
    columns = jnp.arange(capacity, dtype=jnp.int32)[None, None]
    mask &= columns < lengths[:, None, None]
    return mask if first is None else mask & (columns >= first[:, None, None])
