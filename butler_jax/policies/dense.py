"""Everything: the reference that every budget is judged against."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from butler_jax.policies.base import Chunk, Policy


@dataclass(frozen=True, kw_only=True)
class Dense(Policy):
    """Attends to every key; its budget is 1 whatever is asked."""

    name = "dense"

    def scores(self, chunk: Chunk):
        """No key before another."""
        return jnp.zeros_like(chunk.logits[:, :, :1])
