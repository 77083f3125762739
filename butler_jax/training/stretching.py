"""Positions of longer contexts than the rows of a training have.

Positional skip-wise training (D. Zhu et al., arXiv 2309.10400): a document is read in two parts, and the positions of
the second part are moved on. The base attends over the distances between them, and so a predictor is trained for them.
Layers that slide beside others that see everything keep the places of the tokens.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from butler_jax.model import BaseConfig


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
