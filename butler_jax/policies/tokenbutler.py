"""The trained predictor (TokenButler, arXiv 2503.07518)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from butler_jax.policies.scoring import Chunk, Scoring, normalise


@dataclass(frozen=True, kw_only=True)
class TokenButler(Scoring):
    """Scores by the predictor's importance q_imp . k_imp / sqrt(R), pooled per KV head.

    Attributes:
        pooling: How a group is pooled. "normalised" subtracts each head's log-sum-exp over the contested keys (those of
            training: neither sinks nor recent) and takes the maximum. "maximum" is the plain maximum, as published, and
            is cheaper.
    """

    name = "tokenbutler"
    needs_predictor = True
    pooling: Literal["normalised", "maximum"] = "normalised"

    def __post_init__(self):
        known = ("normalised", "maximum")
        if self.pooling not in known:
            raise ValueError(f"unknown pooling {self.pooling!r}; known: {', '.join(known)}")

    @property
    def predictor_pooling(self):
        """The field `pooling`."""
        return self.pooling

    def numbers_read_per_key(self, base, predictor):
        """The numbers of k_imp, shared by the KV heads."""
        return predictor.config.rank * predictor.key_heads / base.kv_heads

    def scores(self, chunk: Chunk):
        """The importance per query head. NaN counts as -inf."""
        self.require_predictor(chunk.predicted)
        return jnp.where(jnp.isnan(chunk.predicted), -jnp.inf, chunk.predicted)

    def pool(self, scores, chunk: Chunk):
        """The maximum over the group."""
        if self.pooling == "normalised":
            scores = normalise(scores, chunk.contested)
        return scores.max(axis=2)
