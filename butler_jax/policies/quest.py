"""Quest (Tang et al. 2024, arXiv 2406.10774): whole pages, by an upper bound of the logits in a page."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.policies.scoring import Chunk, Scoring
from butler_jax.selection import SelectionConfig
from butler_jax.storage import settle_types

Range = tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]]


@dataclass(frozen=True, kw_only=True)
class Quest(Scoring):
    """Scores a page by sum_d max(q_d min_d, q_d max_d) over the range of its keys, and reads whole pages.

    Of a row's own page, only the keys up to the row count. Under the allocation top_p, the bound estimates the logit of
    every key of the page.

    Attributes:
        page: Tokens of a page, a power of two.
    """

    name = "quest"
    estimates_logits = True
    page: int = 16

    def __post_init__(self):
        settle_types(self)
        if self.page < 1 or self.page & (self.page - 1):
            raise ValueError(f"a page of quest must be a power of two (1, 2, 4, 8, 16, ...), got {self.page}")

    def selection(self, config: SelectionConfig) -> SelectionConfig:
        """The selection with pages as units. Raises ValueError for other units, and a tail that pages do not fit."""
        if config.unit not in (1, self.page):
            raise ValueError(
                f"quest has pages of {self.page}, not units of {config.unit}; give quest:page={config.unit}"
            )
        if config.tail % self.page:
            raise ValueError(
                f"a tail of {config.tail} tokens does not fit quest's pages of {self.page}; give a multiple, or set "
                "smaller pages, as in quest:page=8"
            )
        return dataclasses.replace(super().selection(config), unit=self.page)

    def numbers_read_per_key(self, base, predictor):
        """The two ends of a page's range, shared by its tokens."""
        return 2 * base.head_dim / self.page

    def scores(self, chunk: Chunk):
        """The bound of each token's page, per query head."""
        so_far, whole = page_ranges(chunk.k, chunk.columns, chunk.starts, self.page)
        up, down = jnp.maximum(chunk.q, 0), jnp.minimum(chunk.q, 0)

        def bound(product, low, high):
            parts = ((up, high), (down, low))
            return sum(jnp.einsum(product, *part, preferred_element_type=jnp.float32) for part in parts)

        own = jnp.clip(chunk.rows.own - chunk.columns[0], 0, chunk.k.shape[2] - 1)  # a row's own place among the keys
        mine = bound("bkgcd,bkcd->bkgc", *(jnp.take_along_axis(a, own[:, None, :, None], axis=2) for a in so_far))
        first = chunk.rows.own - (chunk.rows.own - chunk.rows.start) % self.page
        same = chunk.columns[None, None] >= first[..., None]
        return jnp.where(same[:, None, None], mine[..., None], bound("bkgcd,bksd->bkgcs", *whole))


def page_ranges(
    keys: Float[Array, "B K S D"], columns: Int[Array, " S"], starts: Int[Array, "B S"], page: int
) -> tuple[Range, Range]:
    """The ranges of the keys in each token's page: of those up to the token, and of all.

    A range is the smallest and the largest value in every dimension. Pages are counted from the column where each key's
    document begins, `starts`. The end of the document, or of the keys, may cut a page. `columns` are consecutive.
    """
    place = (columns[None] - starts) % page
    low = high = keys
    step = 1
    while step < page:  # ranges of 2, 4, 8, ... tokens within the page
        inside = ((place >= step) & (columns - columns[0] >= step)[None])[:, None, :, None]
        low = jnp.where(inside, jnp.minimum(low, jnp.roll(low, step, axis=2)), low)
        high = jnp.where(inside, jnp.maximum(high, jnp.roll(high, step, axis=2)), high)
        step *= 2
    size = keys.shape[2]
    index = jnp.arange(size, dtype=jnp.int32)[None]
    begins = jnp.where(starts == columns[None], index, size)
    following = jax.lax.cummin(jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=size), axis=1, reverse=True)
    last = jnp.minimum(index + page - 1 - place, following - 1)[:, None, :, None]
    return (low, high), tuple(jnp.take_along_axis(a, last, axis=2) for a in (low, high))
