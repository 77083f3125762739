"""CItruS (Bai et al. 2024, arXiv 2406.12018): eviction chunk by chunk, by the attention of an instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.policies.eviction import Evicting
from butler_jax.storage import settle_types

UNRATED = float(jnp.finfo(jnp.float32).max)  # above all attention


class ChunkAttention(NamedTuple):
    """Attention of the instructions of chunks.

    Attributes:
        attention: What each token got from the instruction of the current chunk so far.
        rating: What each token is worth since the last chunk ended.
        begun: First column of the current chunk.
        size: Tokens of the current chunk.
    """

    attention: Float[Array, "B K S"]
    rating: Float[Array, "B K S"]
    begun: Int[Array, " B"]
    size: Int[Array, " B"]


@dataclass(frozen=True, kw_only=True)
class CItruS(Evicting):
    """Rates tokens at the end of every chunk by the attention that the instruction pays to the tokens before the chunk.

    The ratings hold until the next chunk ends. Each row drops the token with the lowest rating, so that the budget
    holds at every row. As published, the current chunk and the one before it stay whole; their tokens are rated one
    chunk later. The publication keeps 768 states besides the 256 tokens of a chunk and those of the next one. So a
    chunk is a fifth of the budget here, and at most `chunk` tokens. Its size is fixed when it begins.

    The published instruction is a separate text that runs after every chunk and is discarded. Here a row knows only the
    text before it, so the instruction is the last `observed` rows of the chunk, or the whole chunk where it is shorter.
    With `observed` at least `chunk` it is always the whole chunk, as published for text without an instruction. This is
    the variant with a shared cache. Tokens are kept per KV head, where the authors average over the heads of a layer.

    Attributes:
        chunk: Largest number of tokens in a chunk.
        observed: Rows at the end of a chunk that serve as the instruction.
    """

    name = "citrus"
    form = (
        "row after row, by the last rows of a chunk; published as cuts at the ends of chunks, by a separate instruction"
    )
    chunk: int = 256
    observed: int = 32

    def __post_init__(self):
        settle_types(self)
        if self.chunk < 1:
            raise ValueError(f"a chunk of citrus must have at least 1 token, got {self.chunk}")
        if self.observed < 1:
            raise ValueError(f"citrus must observe at least 1 row, got {self.observed}")

    def begin(self, shape):
        """No attention and no ratings."""
        nothing, number = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.int32)
        return ChunkAttention(nothing, nothing, number, number)

    def observe(self, memory, weights, place, budget):
        """Add the attention of the chunk's last rows, and rate the tokens when the chunk ends."""
        size = jnp.clip(budget // 5, 1, self.chunk)
        first = place.own == place.start
        begun, length = jnp.where(first, place.own, memory.begun), jnp.where(first, size, memory.size)
        rows = place.own - begun + 1
        attention = jnp.where(place.first, 0.0, memory.attention)
        attention = attention + jnp.where((rows > length - self.observed)[:, None, None], weights, 0.0)
        rating = jnp.where(place.first, UNRATED, memory.rating)
        border = rows >= length
        older = (jnp.arange(weights.shape[-1], dtype=jnp.int32)[None] < begun[:, None])[:, None]
        at = border[:, None, None]
        rating = jnp.where(at, jnp.where(older, attention, UNRATED), rating)
        attention = jnp.where(at, 0.0, attention)
        begun, length = jnp.where(border, place.own + 1, begun), jnp.where(border, size, length)
        return ChunkAttention(attention, rating, begun, length)

    def worth(self, memory):
        """The ratings."""
        return memory.rating

    def recent(self, budget):
        """The row's own token. The chunks that stay whole are not rated yet."""
        return jnp.ones_like(budget)
