"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the sinks and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from butler_jax.policies.scoring import Chunk, Scoring


@dataclass(frozen=True, kw_only=True)
class Streaming(Scoring):
    """Scores by position, so that the newest tokens are read. The selection adds the sinks."""

    name = "streaming"

    def scores(self, chunk: Chunk):
        """The position of each key, exact in float32 up to 2**24 tokens."""
        columns = chunk.columns.astype(jnp.float32)[None, None, None, None]
        batch, kv_heads, _, rows, keys = chunk.logits.shape
        return jnp.broadcast_to(columns, (batch, kv_heads, 1, rows, keys))
