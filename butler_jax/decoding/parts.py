"""Caches whose tokens are split over devices: what each part does on its own, and how partial results merge.

Part i of N holds the tokens i * S/N ... (i + 1) * S/N - 1 of every row. Everything here runs inside
`parallel.by_rows_and_heads`, in which each device has its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.model import LOWEST, PartialAttention, soft_cap
from butler_jax.parallel import by_rows_and_heads, token_axis
from butler_jax.selection import Chosen
from pallas_kernels import compact


class Part(NamedTuple):
    """The tokens `begin` ... `begin + size - 1`, this device's; axis: the mesh axis over which the parts lie."""

    axis: str
    begin: Int[Array, ""]
    size: int

    def count(self, lengths: Int[Array, " B"]) -> Int[Array, " B"]:
        """How many of the first `lengths` tokens are here."""
        return jnp.clip(lengths - self.begin, 0, self.size)

    def log_sum(self, totals: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The log-sum-exp over all parts of theirs; -inf where no part has anything."""
        top = jax.lax.pmax(totals, self.axis)
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        return top + jnp.log(jax.lax.psum(jnp.exp(totals - top), self.axis))

    def own(self, chosen: Chosen, unit: int) -> Chosen:
        """Those of the chosen units that are here, counted from here."""
        units, first = self.size // unit, self.begin // unit
        here = chosen.valid & (chosen.indices >= first) & (chosen.indices < first + units)
        slots, held = compact(here, min(units, here.shape[-1]))
        indices = jnp.take_along_axis(chosen.indices, slots, axis=-1) - first
        return Chosen(jnp.where(held, indices, 0), held)

    def merged(
        self, top: Float[Array, "*B 1"], total: Float[Array, "*B 1"], sums: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"], Float[Array, "*B D"]]:
        """Attention over all parts, each given as the state of a running softmax.

        top: the largest logit, finite or, where nothing was seen, -inf or hugely negative. total, sums: of weights
        exp(logit - top), and of values so weighted.
        """
        highest = jnp.maximum(jax.lax.pmax(top, self.axis), LOWEST)
        shrink = jnp.exp(top - highest)
        return highest, jax.lax.psum(total * shrink, self.axis), jax.lax.psum(sums * shrink, self.axis)

    def joined(self, own: PartialAttention) -> PartialAttention:
        """Attention over all parts, each of which has its own; float32."""
        top, total, sums = self.merged(own.lse[..., None], 1.0, own.output.astype(jnp.float32))
        return PartialAttention.of_sums(top[..., 0], total[..., 0], sums)


def part_of(size: int, axis: str | None) -> Part | None:
    """This device's part, of `size` tokens; None where no axis splits them."""
    return None if axis is None else Part(axis, jax.lax.axis_index(axis) * size, size)


def attend_new(
    q: Float[Array, "B H D"], new_k: Float[Array, "B K D"], new_v: Float[Array, "B K D"], softcap: float | None = None
) -> PartialAttention:
    """Attention of the newest tokens over themselves alone."""
    queries = q.reshape(q.shape[0], new_k.shape[1], -1, q.shape[2]).astype(jnp.float32)
    logits = jnp.sum(queries * new_k[:, :, None].astype(jnp.float32), axis=-1) * q.shape[2] ** -0.5
    values = jnp.broadcast_to(new_v[:, :, None].astype(jnp.float32), queries.shape)
    return PartialAttention(values.reshape(q.shape), soft_cap(logits, softcap).reshape(q.shape[:2]))


def parts_of(capacity: int) -> int:
    """The parts into which the current mesh splits a cache of `capacity` tokens."""
    axis = token_axis(capacity)
    return 1 if axis is None else jax.sharding.get_abstract_mesh().shape[axis]


def check_units(capacity: int, unit: int) -> None:
    """Raise ValueError where the current mesh splits a cache of `capacity` tokens inside a unit."""
    parts = parts_of(capacity)
    if parts > 1 and capacity // parts % unit != 0:
        raise ValueError(
            f"a cache of {capacity} tokens in {parts} parts does not hold whole units of {unit}; choose a capacity "
            f"that is a multiple of {parts * unit}"
        )


def write_parts(
    put: Callable[[Array, Array, Array], Array],
    cache: Array,
    new: Array,
    places: Int[Array, "*B"],
    letters: Sequence[str],
) -> Array:
    """put(cache, new, places), where every device writes what lies in its part; what lies beyond a cache is dropped.

    letters: of the three, as in `by_rows_and_heads`.
    """
    size, rows, heads = (cache.shape[letters[0].index(letter)] for letter in "sbh")
    axis = token_axis(size)

    def run(cache, new, places):
        part = part_of(cache.shape[letters[0].index("s")], axis)
        if part is None:
            return put(cache, new, places)
        here = (places >= part.begin) & (places < part.begin + part.size)
        return put(cache, new, jnp.where(here, places - part.begin, part.size))

    return by_rows_and_heads(run, letters, letters[0], rows=rows, heads=heads, tokens=size)(cache, new, places)


def write_chunk(cache: Array, new: Array, start: Int[Array, ""] | int, letters: str) -> Array:
    """The cache with the tokens start ... start + T - 1 of all rows; letters: of cache and new."""
    dimension = letters.index("s")
    if token_axis(cache.shape[dimension]) is None:
        return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, dimension)

    def put(cache, new, places):
        return cache.at[(*[slice(None)] * dimension, places)].set(new.astype(cache.dtype))

    places = start + jnp.arange(new.shape[dimension], dtype=jnp.int32)
    return write_parts(put, cache, new, places, (letters, letters.replace("s", "-"), "-"))
