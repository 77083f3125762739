"""Everything: the reference that every budget is judged against."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from butler_jax.policies.scoring import Chunk, Scoring


@dataclass(frozen=True, kw_only=True)
class Dense(Scoring):
    """Attends to every key, whatever the budget."""

    name = "dense"

    def selection(self, config):
        """Everything is read."""
        return None

    def scores(self, chunk: Chunk):
        """No key before another."""
        return jnp.zeros_like(chunk.logits[:, :, :1])
