"""Dense attention: the reference for every budget."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from butler_jax.policies.scoring import Chunk, Scoring


@dataclass(frozen=True, kw_only=True)
class Dense(Scoring):
    """Attends to every key, whatever the budget."""

    name = "dense"

    def selection(self, config):
        """None: everything is read."""
        return None

    @property
    def generation_mode(self):
        """Nothing is chosen."""
        return "dense"

    def scores(self, chunk: Chunk):
        """Zeros, since all keys are read."""
        return jnp.zeros_like(chunk.logits[:, :, :1])
