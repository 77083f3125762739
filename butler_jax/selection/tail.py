"""The tail: an estimate of what the keys that a row does not read add to its attention.

Each N tokens of a document are a span. A span counts for a row that comes after all its tokens. Its n unread keys are
taken for n keys that all are the span's mean key, and whose values are its mean value: they weigh n exp(q . mean k),
before the softmax divides. So 2 D numbers are read for N tokens. RetroInfer (Chen et al. 2025, arXiv 2505.02922) does
the same with clusters of keys in the place of spans.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import PartialAttention
from butler_jax.selection.masks import Rows
from pallas_kernels import span_sums


def attend_spans(
    q: Float[Array, "B K G C D"],
    mean_k: Float[Array, "B K U D"],
    mean_v: Float[Array, "B K U D"],
    unread: Int[Array, "B _ _ C U"],
    softcap: float | None = None,
) -> PartialAttention:
    """Attention of scaled queries over the unread keys of spans; unread: how many each span has for a row."""
    batch, kv_heads, group, rows = q.shape[:4]
    counts = jnp.broadcast_to(unread, (batch, kv_heads, group, rows, unread.shape[-1]))
    queries, counts = (a.reshape(batch, kv_heads, group * rows, -1) for a in (q, counts))
    top, total, sums = span_sums(queries, mean_k, mean_v, counts, softcap=softcap)
    return PartialAttention.of_sums(*(a.reshape(q.shape[:4]) for a in (top, total)), sums.reshape(q.shape))


class TailSpans(NamedTuple):
    """The whole spans of documents among consecutive columns of keys.

    Attributes:
        tokens: Columns of their tokens, counted from the first column; 0 where there is no span.
        exist: Which of the U places hold a span.
    """

    tokens: Int[Array, "B U N"]
    exist: Bool[Array, "B U"]

    @classmethod
    def find(cls, columns: Int[Array, " S"], starts: Int[Array, "B S"], size: int) -> TailSpans:
        """The spans of `size` tokens, counted from the start of each document; starts: where the key's one begins."""
        here = jnp.arange(len(columns), dtype=jnp.int32)[None]
        ends = ((columns[None] - starts) % size == size - 1) & (here >= size - 1)
        count = len(columns) // size
        order = jnp.where(ends, jnp.cumsum(ends, axis=1, dtype=jnp.int32) - 1, count)
        row = jnp.arange(len(starts))[:, None]
        last = jnp.full((len(starts), count), -1, jnp.int32).at[row, order].set(here, mode="drop")
        tokens = last[..., None] - jnp.arange(size - 1, -1, -1, dtype=jnp.int32)[None, None]
        return cls(jnp.maximum(tokens, 0), last >= 0)

    def means(self, x: Float[Array, "B K S D"]) -> Float[Array, "B K U D"]:
        """The mean of each span's keys or values, in their dtype, as decoding keeps it."""
        batch, count, size = self.tokens.shape
        of_spans = jnp.take_along_axis(x, self.tokens.reshape(batch, 1, -1, 1), axis=2)
        split = of_spans.reshape(*x.shape[:2], count, size, x.shape[3])
        return jnp.mean(split.astype(jnp.float32), axis=3).astype(x.dtype)

    def unread(
        self,
        mask: Bool[Array, "B H C S"],
        allowed: Bool[Array, "#B C S"],
        rows: Rows,
        columns: Int[Array, " S"],
    ) -> Int[Array, "B H C U"]:
        """How many keys of each span a row does not read; 0 where the row does not come after all its tokens.

        mask: the keys that are read. allowed: those that a row may see.
        """
        batch, count, size = self.tokens.shape
        of_spans = jnp.take_along_axis(mask, self.tokens.reshape(batch, 1, 1, -1), axis=3)
        read = jnp.sum(of_spans.reshape(*mask.shape[:3], count, size), axis=-1, dtype=jnp.int32)
        first, last = self.tokens[:, None, :, 0], columns[self.tokens[:, None, :, -1]]
        seen = jnp.take_along_axis(jnp.broadcast_to(allowed, (batch, *allowed.shape[1:])), first, axis=2)
        counts = self.exist[:, None] & seen & (last < rows.own[..., None])
        return jnp.where(counts[:, None], size - read, 0)
