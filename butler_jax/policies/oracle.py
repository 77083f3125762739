"""The true attention weights: the best that a choice for one layer and step can know."""

from __future__ import annotations

from dataclasses import dataclass

from butler_jax.policies.scoring import Chunk, Scoring, normalise, per_query_head


@dataclass(frozen=True, kw_only=True)
class Oracle(Scoring):
    """Scores by the true softmax weight, pooled per KV head by the maximum over its query heads.

    The logarithm of the weight is used: the same order, without underflow.
    """

    name = "oracle"

    def numbers_read_per_key(self, base, predictor):
        """Whole keys."""
        return float(base.head_dim)

    def scores(self, chunk: Chunk):
        """True logits."""
        return chunk.logits

    def pool(self, scores, chunk: Chunk):
        """Largest weight in the group."""
        return normalise(scores, chunk.allowed).max(axis=2)


@dataclass(frozen=True, kw_only=True)
class OracleHead(Oracle):
    """The same with a set for every query head: a bound, for heads of a group then read different keys."""

    name = "oracle_head"

    def choosing_heads(self, base):
        """Every query head."""
        return base.heads

    def pool(self, scores, chunk: Chunk):
        """Nothing shared."""
        return per_query_head(scores)
