"""A choice of units once it is made: kept while the window moves on, counted, and as a set of tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from butler_jax.selection.budget import Limits
from butler_jax.selection.config import SelectionConfig
from butler_jax.selection.top_k import Chosen


def kept(chosen: Chosen, lengths: Int[Array, " B"], config: SelectionConfig) -> Chosen:
    """The choice without the units of its window, to be used again while the window moves on."""
    low = jnp.maximum(lengths - config.recent, 0) // config.unit
    valid = chosen.valid & (chosen.indices < low[:, None, None])
    return Chosen(jnp.where(valid, chosen.indices, 0), valid)


def with_recent(
    keep: Chosen, low: Int[Array, " B"], lengths: Int[Array, " B"], config: SelectionConfig, capacity: int
) -> Chosen:
    """A kept choice and the units of the tokens low ... lengths - 1, at most recent + interval - 1 of them."""
    batch, heads, _ = keep.indices.shape
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
    """How many tokens of first ... lengths - 1 the chosen units hold."""
    begin = chosen.indices * unit
    end = jnp.minimum(begin + unit, lengths[:, None, None])
    if first is not None:
        begin = jnp.maximum(begin, first[:, None, None])
    return jnp.sum(jnp.where(chosen.valid, jnp.maximum(end - begin, 0), 0), axis=-1)


def chosen_tokens(
    chosen: Chosen, lengths: Int[Array, " B"], first: Int[Array, " B"] | None, unit: int, capacity: int
) -> Bool[Array, "B K S"]:
    """The set of tokens that the chosen units hold."""
    batch, heads, _ = chosen.indices.shape
    units = -(-capacity // unit)
    place = (jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None])
    mask = jnp.zeros((batch, heads, units), bool)
    mask = mask.at[(*place, jnp.where(chosen.valid, chosen.indices, units))].set(True, mode="drop")
    mask = jnp.repeat(mask, unit, axis=-1)[..., :capacity]
    columns = jnp.arange(capacity, dtype=jnp.int32)[None, None]
    mask &= columns < lengths[:, None, None]
    return mask if first is None else mask & (columns >= first[:, None, None])


def recent_from(
    limits: Limits,
    config: SelectionConfig,
    lengths: Int[Array, " B"],
    steps: Int[Array, ""],
    sliding_window: Int[Array, ""] | None,
) -> Int[Array, " B"]:
    """The first token that is attended for being recent, some steps after a choice.

    The window moves on; but a row whose choice was everything loses nothing: all that came since is recent. Nor does a
    row so short that its window held sinks, whatever its thresholds let pass.
    """
    then = lengths - steps % config.interval
    count = then if sliding_window is None else jnp.minimum(then, sliding_window)
    everything = limits.table[count] >= count
    if limits.threshold is not None:
        everything &= count <= max(limits.min_context, config.least)
    return jnp.maximum(jnp.where(everything, then, lengths) - config.recent, 0)
