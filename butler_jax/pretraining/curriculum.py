"""The batches of pretraining: short rows first, rows of the whole context at the end."""

from __future__ import annotations

import jax
import numpy as np

from butler_jax.data import read_batches
from butler_jax.parallel import check_batch, rows_here
from butler_jax.pretraining.config import PretrainConfig
from butler_jax.text import Tokenizer


class Curriculum:
    """Rows of --length, then rows of the whole context for the last --long-steps, with as many tokens a step."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
        sizes = [(config.length, config.batch_size)]
        if config.long_steps:
            check_batch(
                config.long_rows, mesh, what=f"--long-steps have rows of {config.context} tokens: their batch size"
            )
            sizes.append((config.context, config.long_rows))
        self._switch = config.steps - config.long_steps
        self._taken = 0
        self._streams = [
            read_batches(
                config.data,
                tokenizer,
                length=length,
                batch_size=batch_size,
                seed=config.seed + phase,
                data_dir=config.data_dir,
                strict=config.strict_data,
                whole=True,
                rows=rows_here(batch_size, mesh),
            )
            for phase, (length, batch_size) in enumerate(sizes)
        ]

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._streams[self._taken >= self._switch])
        self._taken += 1
        return batch

    def get_state(self) -> dict:
        """Where both streams stand; JSON."""
        return {"taken": self._taken, "streams": [s.get_state() for s in self._streams]}

    def set_state(self, state: dict) -> None:
        """Go on from get_state."""
        self._taken = state["taken"]
        for stream, where in zip(self._streams, state["streams"], strict=True):
            stream.set_state(where)
