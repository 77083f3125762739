"""The interface of every store of keys and values.

A pass over the layers only reads a store. The tokens it made are written afterwards, all layers at once, so that
donated arrays are updated in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from butler_jax.decoding.cached_attention import attend_cached
from butler_jax.decoding.newest_tokens import Newest
from butler_jax.decoding.parts import write_chunk, write_parts
from butler_jax.model import LayerView, PartialAttention, sink_logits
from butler_jax.parallel import current_mesh
from butler_jax.selection import Chosen
from pallas_kernels import Spans, masked_topk_decode_attention

CACHE_LETTERS = "-bhs-"  # dimensions of a cache, as parallel.by_rows_and_heads names them
PAGE = 64  # the most tokens of a window that are read together


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
        where = (self.k, self.v, view.index, newest.cached, sliding_window)
        return attend_cached(view.q, view.k, view.v, *where, **view.attention_terms)

    def attend_seen(
        self, view: LayerView, newest: Newest, sliding_window: int | None, *, implementation: str | None
    ) -> Float[Array, "B 1 H D"]:
        """Return attention of one new token a row over all that it sees. Of the cache, only the window is read.

        sliding_window: of the layer, static; None reads all.
        """
        if sliding_window is None or sliding_window >= self.capacity:
            return self.attend_all(view, newest)
        unit = min(self.page, 1 << (sliding_window.bit_length() - 1))
        held = self.capacity // unit
        count = min((sliding_window + unit - 2) // unit + 1, held)  # a window may begin inside of a page
        first = jnp.minimum(jnp.maximum(newest.total - sliding_window, 0) // unit, held - count)
        pages = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        shape = (pages.shape[0], view.k.shape[2], pages.shape[1])
        valid = pages * unit < newest.total[:, None]
        window = Chosen(*(jnp.broadcast_to(a[:, None], shape) for a in (jnp.where(valid, pages, 0), valid)))
        return self.attend(view, window, newest, unit=unit, rows=None, implementation=implementation)[0]

    @property
    def page(self) -> int:
        """Tokens that are read together of a sliding window."""
        return math.gcd(self.capacity, PAGE)

    def attend_first(
        self, view: LayerView, newest: Newest, sliding_window: int | None, *, implementation: str | None
    ) -> Float[Array, "B 1 H D"]:
        """`attend_seen` of layer 0, where the layer is known to be that one."""
        return self.attend_seen(view, newest, sliding_window, implementation=implementation)

    def attend(
        self,
        view: LayerView,
        chosen: Chosen,
        newest: Newest,
        *,
        unit: int,
        rows: Any,
        implementation: str | None,
        spans: Spans | None = None,
    ) -> tuple[Float[Array, "B 1 H D"], Float[Array, "B K S"] | None]:
        """Attend to chosen units of the layer in view, and to the new token.

        Where every query head has a set of its own, one head of each group goes at a time, so that nothing of the store
        is repeated.

        Args:
            chosen: Units to read, [B, K, N] or [B, H, N].
            rows: What `prefetch` gave for these units; None where nothing was fetched.
            spans: Means of spans that are attended besides, stacked over layers; counts for each choosing head.

        Returns:
            The output, and the attention weights summed over the group where the store is `evicting`, else None.
        """
        batch, _, heads, dim = view.q.shape
        kv_heads = view.k.shape[2]
        group = chosen.indices.shape[1] // kv_heads
        options, sinks = dict(unit=unit, implementation=implementation), sink_logits(view.weights)
        if group == 1:
            options |= dict(rows=rows, sinks=sinks, spans=spans)
            return self._attend_set(view, view.q[:, 0], chosen, newest, **options)[:, None], None
        queries = view.q.reshape(batch, kv_heads, group, dim)
        apart = jax.tree.map(lambda a: a.reshape(batch, kv_heads, group, -1), chosen)
        parts = []
        for g in range(group):
            own = jax.tree.map(lambda a, g=g: a[:, :, g], apart)
            of_heads = None if sinks is None else sinks[g::group]
            terms = dict(sinks=of_heads, spans=spans and spans._replace(counts=spans.counts[:, g::group]))
            parts.append(self._attend_set(view, queries[:, :, g], own, newest, **terms, **options))
        return jnp.stack(parts, axis=2).reshape(batch, 1, heads, dim), None

    def _attend_set(
        self, view, q, chosen, newest, *, unit, implementation, sinks, spans, rows=None
    ) -> Float[Array, "B H D"]:
        """Attention of the queries [B, H, D] that share the chosen units of a KV head.

        sinks: of these queries. spans: as of `attend`. Both may be None.
        """
        raise TypeError(f"{type(self).__name__} must define _attend_set")

    def prefetch(self, layer: Int[Array, ""], chosen: Chosen, newest: Newest, unit: int) -> Any:
        """The rows of chosen units where they have to travel before they are attended; None elsewhere."""
        return None

    def sum_spans(self, lengths: Int[Array, " B"], size: int) -> tuple[Float[Array, "L B K U D"], ...]:
        """Sums of the keys and of the values of each span of `size` tokens, over the tokens held; float32."""
        held = held_tokens(self.capacity, lengths, size)
        return tuple(sum_spans(a, held) for a in (self.k, self.v))

    def append(self, k: Float[Array, "L B K D"], v: Float[Array, "L B K D"], lengths: Int[Array, " B"]) -> Self:
        """The store with one more token a row, at its length; a full row stays as it is."""
        written = (write_token(a, b, lengths) for a, b in ((self.k, k), (self.v, v)))
        return replace(self, **dict(zip("kv", written, strict=True)))

    def append_chunk(self, k: Float[Array, "L B K T D"], v: Float[Array, "L B K T D"], start: Any) -> Self:
        """The store with the tokens start ... start + T - 1 of all rows."""
        written = (write_chunk(a, b, start, CACHE_LETTERS) for a, b in ((self.k, k), (self.v, v)))
        return replace(self, **dict(zip("kv", written, strict=True)))

    def put_row(self, row: KVStore, number: Int[Array, ""]) -> Self:
        """The store with the only row of another one, of the same capacity, in the place of row `number`."""
        return replace(self, k=put_row(self.k, row.k, number), v=put_row(self.v, row.v, number))


def attend_chosen(
    q: Float[Array, "B H D"],
    k: Float[Array, "*L B K S D"],
    v: Float[Array, "*L B K S D"],
    chosen: Chosen,
    sinks: Float[Array, " H"] | None,
    **options: Any,
) -> Float[Array, "B H D"]:
    """`masked_topk_decode_attention` with options; sinks: one more logit of every query head in its softmax."""
    if sinks is None:
        return masked_topk_decode_attention(q, k, v, *chosen, **options)
    found = PartialAttention(*masked_topk_decode_attention(q, k, v, *chosen, return_residual=True, **options))
    return merge_sinks(found, sinks).output.astype(q.dtype)


def merge_sinks(found: PartialAttention, sinks: Float[Array, " H"] | None) -> PartialAttention:
    """Attention [B, H] with one more logit of every query head, if there is one, in its softmax."""
    if sinks is None:
        return found
    logits = jnp.broadcast_to(sinks.astype(jnp.float32)[None], found.lse.shape)
    return found.merge(PartialAttention(jnp.zeros(found.output.shape, jnp.float32), logits))


def held_tokens(capacity: int, lengths: Int[Array, " B"], size: int) -> Float[Array, "B U N"]:
    """1 for the tokens that each row holds in spans of `size`, else 0; tokens that fill no span are left out."""
    columns = jnp.arange(capacity // size * size, dtype=jnp.int32)
    return (columns[None] < lengths[:, None]).astype(jnp.float32).reshape(len(lengths), -1, size)


def sum_spans(a: Float[Array, "L B K S D"], held: Float[Array, "B U N"]) -> Float[Array, "L B K U D"]:
    """Sums of spans over the tokens held, float32, layer by layer: a whole cache in float32 would not fit."""
    _, count, size = held.shape

    def sum_layer(a):
        split = a[:, :, : count * size].reshape(*a.shape[:2], count, size, a.shape[3])
        return jnp.sum(split.astype(jnp.float32) * held[:, None, :, :, None], axis=3)

    return jax.lax.map(sum_layer, a)


def put_row(rows: Shaped[Array, "*rows"], row: Shaped[Array, "*row"], number: Int[Array, ""]) -> Shaped[Array, "*rows"]:
    """An array of B rows with another row at `number`. The axis of rows is the one in which the two differ."""
    row = row.astype(rows.dtype)
    axis = next((n for n, (many, one) in enumerate(zip(rows.shape, row.shape, strict=True)) if many != one), None)
    if axis is None:  # there is one row
        return row
    if current_mesh() is None:
        return jax.lax.dynamic_update_slice_in_dim(rows, row, number, axis)
    here = jnp.arange(rows.shape[axis]) == number  # no device asks for the rows of others
    others = [n for n in range(rows.ndim) if n != axis]
    return jnp.where(jnp.expand_dims(here, others), row, rows)


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
