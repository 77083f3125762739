"""Positions of longer contexts than the rows of a training have.

Positional skip-wise training (D. Zhu et al., arXiv 2309.10400): a document is read in two parts, and the positions of
the second part are moved on. The base attends over the distances between them, and so a predictor is trained for them.
Layers that slide beside others that see everything keep the places of the tokens.

A row of the second part lacks the keys of the positions that are skipped. In the cross entropy, each key of the first
part stands for as many as make the row see one key for each position before the second part. Otherwise a predictor is
trained for few keys that are far away, and in a long text a little weight for each of many keys adds up.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from butler_jax.model import BaseConfig, document_places
from butler_jax.training.losses import FarKeys


class StretchedBatches:
    """Batches whose positions are stretched. Their place is that of the batches inside.

    Attributes:
        batches: As `read_batches` gives them.
        reach: As in `stretch_positions`.
    """

    def __init__(self, batches: Any, reach: int):
        self.batches, self.reach = batches, reach

    def __iter__(self) -> StretchedBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return stretch_positions(next(self.batches), self.reach)

    def get_state(self) -> dict[str, Any]:
        """The place of the batches inside."""
        return self.batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place of the batches inside."""
        self.batches.set_state(state)


def default_reach(base: BaseConfig) -> int:
    """The context in tokens that a predictor is trained for: the base's, or the sliding window of the served layers."""
    return min(base.context, base.sliding_window) if base.serves_windows else base.context


def stretch_positions(batch: dict[str, np.ndarray], reach: int) -> dict[str, np.ndarray]:
    """Move the positions of the second part of every document on by a random number of tokens.

    The document then spans a random number of positions, from its own tokens to the reach, and the logarithm of the
    number is uniform. So a far reach takes little from near distances. Where a document is cut, and by how much it
    moves, depends on the tokens of its row alone. So a training that goes on, and one on several hosts, sees the same
    positions.

    Args:
        batch: tokens, segments (0 is padding) and positions, int32 [B, T] each.
        reach: Positions stay below it. A document of as many tokens stays as it is.

    Returns:
        The batch with other positions.
    """
    positions = np.array(batch["positions"])
    for tokens, segments, row in zip(batch["tokens"], batch["segments"], positions, strict=True):
        random = np.random.default_rng(zlib.crc32(np.ascontiguousarray(tokens).tobytes()))
        starts = np.flatnonzero(np.diff(segments, prepend=0))
        for start, stop in zip(starts, [*starts[1:], len(segments)], strict=True):
            size = stop - start
            if segments[start] > 0 and 1 < size < reach:
                spanned = int(size * (reach / size) ** random.random())
                row[random.integers(start + 1, stop) : stop] += spanned - size
    return {**batch, "positions": positions}


def find_far_keys(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> FarKeys:
    """The keys of first parts, for the rows of second parts, and the skipped positions that they stand for."""
    places = document_places(segments)
    columns = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    moved = positions - places
    begins = (moved != jnp.roll(moved, 1, axis=1)) | (places == 0)
    end = jax.lax.cummax(jnp.where(begins, columns, 0), axis=1)
    first_part = end - (columns - places)
    far = (moved > 0) & (first_part > 0)
    count = (first_part + moved) / jnp.maximum(first_part, 1)
    return FarKeys(jnp.where(far, end, 0), jnp.where(far, jnp.log(jnp.where(far, count, 1.0)), 0.0))
