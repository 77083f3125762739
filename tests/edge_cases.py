"""Results where there is nothing to choose from, where scores are equal, and where a number is not finite.

| | result |
|---|---|
| equal scores, or all -inf, or all NaN | recent, sinks, then the earliest |
| a score of +inf | first; -inf and NaN last, the earlier of them first |
| a budget of everything or more, a recent or sinks beyond the length | everything, no token twice |
| a budget of 0, or an integer below sinks + recent | refused; a fraction of so few is raised to sinks + recent |
| a row of length 0 | chooses and attends nothing, 0; its next step attends the new token alone |
| logits all -inf (-1e30 and below) | 0; +inf or NaN: NaN in that row and head |
| losses of empty rows | 0, gradients too, and they do not count; of NaN or +inf: not finite |
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.model.config import BaseConfig

BASE = BaseConfig(
    family="llama", vocab_size=61, width=32, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, context=64
)
NAN, INF = np.nan, np.inf


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def text(*lengths: int, total: int) -> dict[str, jax.Array]:
    """Rows of one document of these lengths, padded to `total`."""
    shape = len(lengths), total
    inside = np.arange(total)[None] < np.asarray(lengths)[:, None]
    tokens = np.where(inside, np.random.default_rng(0).integers(1, 61, shape), 0)
    positions = np.where(inside, np.arange(total)[None], 0)
    arrays = {"tokens": tokens, "segments": inside, "positions": positions}
    return {name: jnp.asarray(a, jnp.int32) for name, a in arrays.items()}
