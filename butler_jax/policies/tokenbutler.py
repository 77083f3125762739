"""The trained predictor (TokenButler, arXiv 2503.07518)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from butler_jax.policies.residual import log_stream_norm, log_value_norms
from butler_jax.policies.scoring import (
    Chunk,
    Scoring,
    estimate_weights,
    largest_in_group,
    mean_over_group,
    normalise,
    subtract_total,
)
from butler_jax.storage import settle_types


@dataclass(frozen=True, kw_only=True)
class TokenButler(Scoring):
    """Scores by the predictor's importance q_imp . k_imp / sqrt(R), pooled per KV head.

    Attributes:
        pooling: How a group is pooled. "normalised" subtracts each head's log-sum-exp over the contested keys (those of
            training: neither sinks nor recent) and takes the maximum. "maximum" is the plain maximum, as published, and
            is cheaper.
        offset: Of the predictor (`PredictorConfig.offset`), as `for_predictor` finds it. With one, scores are
            logarithms of errors in the residual stream and `pooling` does not count.
        error: "value" ranks by the error in the residual stream: a predicted attention weight times the norm that the
            token's value has in the stream (residual.py). None ranks by attention weight alone.
    """

    name = "tokenbutler"
    needs_predictor = True
    pooling: Literal["normalised", "maximum"] = "normalised"
    error: Literal["value"] | None = None
    offset: Literal["none", "share", "self_normalised"] = "none"

    def __post_init__(self):
        settle_types(self)

    def for_predictor(self, predictor):
        """The policy with the predictor's offset.

        Raises:
            ValueError: There is no predictor, or values would count twice, in its target and in the policy's error.
        """
        self.require_predictor(predictor)
        config = predictor.config
        if self.error is not None and config.counts_values:
            raise ValueError(f"the predictor's target is {config.target}, which counts values already: leave out error")
        return dataclasses.replace(self, offset=config.offset)

    @property
    def predictor_pooling(self):
        """The field `pooling`, or the offset where the predictor has one; None where values count too."""
        if self.error is not None:
            return None
        return self.pooling if self.offset == "none" else self.offset

    @property
    def one_unit(self):
        """Whether scores are logarithms of errors: values or an offset count too."""
        return self.error is not None or self.offset != "none"

    @property
    def estimates_logits(self):
        """Whether scores are logits, up to a number for each row and head: neither values nor an offset count."""
        return not self.one_unit

    def numbers_read_per_key(self, base, predictor):
        """The numbers of k_imp, shared by the KV heads, and those of the values whose norms count."""
        return predictor.config.rank * predictor.key_heads / base.kv_heads + self.cached_numbers_per_key(base)

    def cached_numbers_per_key(self, base):
        """Where the norms of values count, whole values are read."""
        return 0.0 if self.error is None else float(base.head_dim)

    def scores(self, chunk: Chunk):
        """The importance per query head. NaN counts as -inf."""
        self.require_predictor(chunk.predicted)
        return jnp.where(jnp.isnan(chunk.predicted), -jnp.inf, chunk.predicted)

    def log_weights(self, chunk: Chunk):
        """Of weights among the contested keys alone, which the predictor was trained on. So p is a share of these."""
        return mean_over_group(estimate_weights(self.scores(chunk), chunk.contested))

    def pool(self, scores, chunk: Chunk):
        """The maximum over the group."""
        if not self.one_unit:
            return largest_in_group(normalise(scores, chunk.contested) if self.pooling == "normalised" else scores)
        if self.offset != "self_normalised":
            scores = subtract_total(scores, chunk.contested)
        scores = scores - log_stream_norm(chunk) if self.offset == "none" else scores + chunk.offset
        if self.error is not None:
            scores = scores + log_value_norms(chunk, self.error)
        return largest_in_group(scores)
