"""Positions of longer contexts than the rows of a training have.

Positional skip-wise training (D. Zhu et al., arXiv 2309.10400): a document is read in two parts, and the positions of
the second part are moved on. The base attends over the distances between them, and so a predictor is trained for them.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np


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


def stretch_positions(batch: dict[str, np.ndarray], reach: int) -> dict[str, np.ndarray]:
    """Move the positions of the second part of every document on by a random number of tokens.

    Where a document is cut, and by how much it moves, depends on the tokens of its row alone. So a training that goes
    on, and one on several hosts, sees the same positions.

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
            room = reach - (stop - start)
            if segments[start] > 0 and stop - start > 1 and room > 0:
                row[random.integers(start + 1, stop) : stop] += random.integers(room + 1, dtype=row.dtype)
    return {**batch, "positions": positions}
