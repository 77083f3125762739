"""CItruS (Bai et al. 2024, arXiv 2406.12018): chunk by chunk, what the instruction looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.policies.evicting import Evicting

UNJUDGED = float(jnp.finfo(jnp.float32).max)  # above all attention


class Judgement(NamedTuple):
    """The attention of this chunk's instruction so far, and what tokens are worth by that of the last border.

    begun: the first column of the chunk under way. size: its tokens.
    """

    heard: Float[Array, "B K S"]
    settled: Float[Array, "B K S"]
    begun: Int[Array, " B"]
    size: Int[Array, " B"]


@dataclass(frozen=True, kw_only=True)
class CItruS(Evicting):
    """At the end of every chunk, the tokens before it are judged by the attention that the instruction pays to them.

    Until the next border that judgement stands: a row drops the token that was worth least, so that the budget holds at
    every row. The chunk under way and the one before it stay whole, as published, and are judged one border later.
    There 768 states are kept, 256 tokens of a chunk and 256 of the next one beside them; so a chunk is a fifth of the
    budget here, and never more than `chunk` tokens. The border is known when the chunk begins.

    The published instruction is a text of its own, which runs after every chunk and is thrown away again. Here a row
    only knows the text before it: the instruction is the last `observed` rows of the chunk, all of them where it is
    shorter. With `observed` at least `chunk` it is the whole chunk, as published for text without an instruction.
    The cache is the one that is shared; tokens are kept per KV head, where the authors average over a layer's heads.
    """

    name = "citrus"
    form = (
        "row after row, by the last rows of a chunk; published as cuts at the ends of chunks, by a separate instruction"
    )
    chunk: int = 256
    observed: int = 32

    def __post_init__(self):
        if not self.chunk >= 1:
            raise ValueError(f"a chunk of citrus must have at least 1 token, got {self.chunk}")
        if not self.observed >= 1:
            raise ValueError(f"citrus must observe at least 1 row, got {self.observed}")

    def begin(self, shape):
        """Nothing judged."""
        nothing, number = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.int32)
        return Judgement(nothing, nothing, number, number)

    def observe(self, memory, weights, place, budget):
        """Listen to the chunk's last rows; judge at its end."""
        size = jnp.clip(budget // 5, 1, self.chunk)
        first = place.own == place.start
        begun, length = jnp.where(first, place.own, memory.begun), jnp.where(first, size, memory.size)
        rows = place.own - begun + 1
        heard = jnp.where(place.first, 0.0, memory.heard)
        heard = heard + jnp.where((rows > length - self.observed)[:, None, None], weights, 0.0)
        settled = jnp.where(place.first, UNJUDGED, memory.settled)
        border = rows >= length
        older = (jnp.arange(weights.shape[-1], dtype=jnp.int32)[None] < begun[:, None])[:, None]
        at = border[:, None, None]
        settled = jnp.where(at, jnp.where(older, heard, UNJUDGED), settled)
        heard = jnp.where(at, 0.0, heard)
        return Judgement(heard, settled, jnp.where(border, place.own + 1, begun), jnp.where(border, size, length))

    def worth(self, memory):
        """What the last border settled."""
        return memory.settled

    def recent(self, budget):
        """The row's own token; the chunks that stay whole are not judged yet."""
        return jnp.ones_like(budget)
