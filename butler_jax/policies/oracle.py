"""The true attention weights: the most that a choice for one layer and step can know."""

from __future__ import annotations

from dataclasses import dataclass

from butler_jax.policies.scoring import Chunk, Scoring, estimate_weights, largest_in_group, normalise, per_query_head


@dataclass(frozen=True, kw_only=True)
class Oracle(Scoring):
    """Scores by the true softmax weight, pooled per KV head by the maximum over its query heads.

    It uses the logarithm of the weight, which has the same order and does not underflow.
    """

    name = "oracle"
    is_bound = True
    estimates_logits = True

    def numbers_read_per_key(self, base, predictor):
        """The head dimension: whole keys are read."""
        return float(base.head_dim)

    def scores(self, chunk: Chunk):
        """The true logits."""
        return chunk.logits

    def pool(self, scores, chunk: Chunk):
        """The largest weight in the group."""
        return largest_in_group(normalise(scores, chunk.allowed, chunk.sink_logits))


@dataclass(frozen=True, kw_only=True)
class OracleHead(Oracle):
    """The oracle with a set for every query head. It is a bound, since heads of a group then read different keys."""

    name = "oracle_head"

    def choosing_heads(self, base):
        """All query heads."""
        return base.heads

    def pool(self, scores, chunk: Chunk):
        """The scores of every query head."""
        return per_query_head(scores)

    def log_weights(self, chunk: Chunk):
        """The logarithms of the weights of every query head."""
        return per_query_head(estimate_weights(self.scores(chunk), chunk.allowed, chunk.sink_logits))
