"""Uniform scores: the baseline without any knowledge."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from butler_jax.policies.scoring import Chunk, Scoring
from butler_jax.storage import settle_types


@dataclass(frozen=True, kw_only=True)
class Random(Scoring):
    """Independent uniform scores for every layer, KV head, query and key.

    They are a hash of the seed and of these positions, counted from the start of the document. So a query has the same
    scores in a pass over the sequence, in decoding step by step, and in any batch.
    """

    name = "random"
    seed: int = 0

    def __post_init__(self):
        settle_types(self)
        if self.seed < 0:
            raise ValueError(f"the seed of random must be 0 or more, got {self.seed}")

    def scores(self, chunk: Chunk):
        """Multiples of 2**-24 in [0, 1), [B, K, 1, C, S]."""
        rows, columns = chunk.rows, chunk.columns
        place = mix(jnp.uint32(self.seed & 0xFFFFFFFF) ^ mix(chunk.layer.astype(jnp.uint32)))
        heads = mix(place + jnp.arange(chunk.k.shape[1], dtype=jnp.uint32))
        query = (rows.own - rows.start).astype(jnp.uint32)
        key = (columns[None, None] - rows.start[..., None]).astype(jnp.uint32)
        row = mix(heads[None, :, None] ^ mix(query)[:, None])
        bits = mix(row[..., None] + key[:, None] * jnp.uint32(0x9E3779B9))
        return ((bits >> 8).astype(jnp.float32) * 2.0**-24)[:, :, None]


def mix(x: UInt32[Array, "*B"] | Int[Array, "*B"]) -> UInt32[Array, "*B"]:
    """The finaliser of MurmurHash3: a bijection of 32-bit integers that spreads every bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
