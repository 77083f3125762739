"""The interface of every store of keys and values.

A pass over the layers only reads a store. The tokens it made are written afterwards, all layers at once, so that
donated arrays are updated in place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from butler_jax.decoding.cached_attention import attend_cached
from butler_jax.decoding.newest_tokens import Newest
from butler_jax.decoding.parts import write_chunk, write_parts
from butler_jax.model import LayerView
from butler_jax.selection import Chosen

CACHE_LETTERS = "-bhs-"  # dimensions of a cache, as parallel.by_rows_and_heads names them


@dataclass(frozen=True)
class KVStore:
    """Keys after rotary and values of every layer; the rows of a head are contiguous.

    Attributes:
        k: Keys.
        v: Values.
        on_host: Whether they lie in host memory.
        evicting: Whether `attend` gives the weights that eviction needs.
    """

    on_host: ClassVar[bool] = False
    evicting: ClassVar[bool] = False
    k: Float[Array, "L B K S D"]
    v: Float[Array, "L B K S D"]

    @property
    def capacity(self) -> int:
        """S, the tokens that a row has room for."""
        return self.k.shape[3]

    def layer(self, index: Int[Array, ""]) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]]:
        """Return keys and values of one layer, for policies that look at them."""
        return tuple(jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in (self.k, self.v))

    def attend_all(self, view: LayerView, newest: Newest) -> Float[Array, "B T H D"]:
        """Return attention of new tokens over all cached tokens of their layer and themselves."""
        sliding_window = newest.sliding_window(view.index)
        return attend_cached(view.q, view.k, view.v, self.k, self.v, view.index, newest.cached, sliding_window)

    def attend_first(self, view: LayerView, newest: Newest) -> Float[Array, "B T H D"]:
        """The same where the layer is known to be layer 0."""
        return self.attend_all(view, newest)

    def attend(
        self, view: LayerView, chosen: Chosen, newest: Newest, *, unit: int, rows: Any, implementation: str | None
    ) -> tuple[Float[Array, "B 1 H D"], Float[Array, "B K S"] | None]:
        """Attend to chosen units of the layer in view, and to the new token.

        Where every query head has a set of its own, one head of each group goes at a time, so that nothing of the store
        is repeated.

        Args:
            chosen: Units to read, [B, K, N] or [B, H, N].
            rows: What `prefetch` gave for these units; None where nothing was fetched.

        Returns:
            The output, and the attention weights summed over the group where the store is `evicting`, else None.
        """
        batch, _, heads, dim = view.q.shape
        kv_heads = view.k.shape[2]
        group = chosen.indices.shape[1] // kv_heads
        options = dict(unit=unit, implementation=implementation)
        if group == 1:
            return self._attend_set(view, view.q[:, 0], chosen, newest, rows=rows, **options)[:, None], None
        queries = view.q.reshape(batch, kv_heads, group, dim)
        apart = jax.tree.map(lambda a: a.reshape(batch, kv_heads, group, -1), chosen)
        parts = [
            self._attend_set(view, queries[:, :, g], jax.tree.map(lambda a, g=g: a[:, :, g], apart), newest, **options)
            for g in range(group)
        ]
        return jnp.stack(parts, axis=2).reshape(batch, 1, heads, dim), None

    def _attend_set(self, view, q, chosen, newest, *, unit, implementation, rows=None) -> Float[Array, "B H D"]:
        """Attention of the queries [B, H, D] that share the chosen units of a KV head."""
        raise TypeError(f"{type(self).__name__} must define _attend_set")

    def prefetch(self, layer: Int[Array, ""], chosen: Chosen, newest: Newest, unit: int) -> Any:
        """The rows of chosen units where they have to travel before they are attended; None elsewhere."""
        return None

    def append(self, k: Float[Array, "L B K D"], v: Float[Array, "L B K D"], lengths: Int[Array, " B"]) -> Self:
        """The store with one more token a row, at its length; a full row stays as it is."""
        written = (write_token(a, b, lengths) for a, b in ((self.k, k), (self.v, v)))
        return replace(self, **dict(zip("kv", written, strict=True)))

    def append_chunk(self, k: Float[Array, "L B K T D"], v: Float[Array, "L B K T D"], start: Any) -> Self:
        """The store with the tokens start ... start + T - 1 of all rows."""
        written = (write_chunk(a, b, start, CACHE_LETTERS) for a, b in ((self.k, k), (self.v, v)))
        return replace(self, **dict(zip("kv", written, strict=True)))


def write_token(
    cache: Shaped[Array, "L B *cached"],
    new: Shaped[Array, "L B *token"],
    lengths: Int[Array, " B"],
    letters: str = CACHE_LETTERS,
) -> Shaped[Array, "L B *cached"]:
    """Write one token a row into a cache, at the row's length; a full row stays as it is.

    It goes row after row, so that each write is a slice. For a scatter over rows, the TPU's compiler changes the layout
    of the whole cache and back. `letters` names the cache's dimensions, as in `parallel.by_rows_and_heads`.
    """
    axis = letters.index("s")

    def put(cache, new, places):
        new = jnp.expand_dims(new, axis).astype(cache.dtype)

        def one(row, cache):
            at = [0] * cache.ndim
            at[letters.index("b")], at[axis] = row, places[row]
            token = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=letters.index("b"))
            old = jax.lax.dynamic_slice(cache, at, token.shape)
            return jax.lax.dynamic_update_slice(cache, jnp.where(places[row] < cache.shape[axis], token, old), at)

        return jax.lax.fori_loop(0, places.shape[0], one, cache)

    return write_parts(put, cache, new, lengths, (letters, "-bh-", "b"))
