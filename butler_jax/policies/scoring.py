"""Policies that score: each key gets a score, and the selection reads the best under the budget."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import grouped_sinks, sink_logits
from butler_jax.policies.base import Policy
from butler_jax.selection import Allocation, Rows, SelectionConfig, always_chosen


class Chunk(NamedTuple):
    """C query rows of one layer and the S keys that they may see: everything a policy can score by.

    The G query heads of a group share one KV head.

    Attributes:
        layer: Index of the layer, from 0.
        weights: Parameters of the layer (`model.Layers`), the output projection `o` [H, D, E] among them.
        x: Residual stream that enters the layer, for the query rows.
        q: Queries after rotary, times D**-0.5.
        k: Keys after rotary.
        v: Values.
        logits: Scaled q . k of every key, masked or not, float32, under the model's soft cap.
        predicted: Scores of the trained predictor in the layout of `logits`; None without a predictor.
        rows: Columns of the query rows and of the first token of their documents.
        columns: Positions of the keys along the sequence.
        allowed: Which keys a row may see; the first axis is 1 without documents.
        starts: Column at which each key's document begins.
        offset: Of the trained predictor, for every row and query head; None where it has none.
        sinks: Sinks of the selection that will choose.
        recent: Recent tokens of the selection that will choose.
        allocation: Of the selection that will choose.
    """

    layer: Int[Array, ""]
    weights: Any
    x: Float[Array, "B C E"]
    q: Float[Array, "B K G C D"]
    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    logits: Float[Array, "B K G C S"]
    predicted: Float[Array, "B K G C S"] | None
    rows: Rows
    columns: Int[Array, " S"]
    allowed: Bool[Array, "_ C S"]
    starts: Int[Array, "_ S"]
    offset: Float[Array, "B K G C 1"] | None = None
    sinks: int = 0
    recent: int = 0
    allocation: Allocation = "per_head"

    def under(self, selection: SelectionConfig) -> Chunk:
        """The chunk with what it has to know of the selection that will choose."""
        return self._replace(sinks=selection.sinks, recent=selection.recent, allocation=selection.allocation)

    def only(self, few: slice) -> Chunk:
        """The chunk with some of its query rows."""
        wide = {name: getattr(self, name)[..., few, :] for name in ("x", "q", "logits", "allowed")}
        for name in ("predicted", "offset"):
            value = getattr(self, name)
            wide[name] = None if value is None else value[..., few, :]
        return self._replace(rows=Rows(*(a[:, few] for a in self.rows)), **wide)

    @property
    def contested(self) -> Bool[Array, "B C S"]:
        """The keys that scores decide about: allowed, and neither sinks nor recent."""
        return self.allowed & ~always_chosen(self.rows, self.columns, self.sinks, self.recent)

    @property
    def sink_logits(self) -> Float[Array, "1 K G 1 1"] | None:
        """The attention sink of every query head, which counts in the softmax of `logits`; None without."""
        return grouped_sinks(sink_logits(self.weights), self.logits.shape[1])


def scaled_products(q: Float[Array, "B K G C R"], k: Float[Array, "B _ S R"]) -> Float[Array, "B K G C S"]:
    """q . k / sqrt(R) in float32, with keys for each KV head, or for each of the K G query heads."""
    form = "bkgcd,bksd->bkgcs"
    if k.shape[1] != q.shape[1]:
        form, k = "bkgcd,bkgsd->bkgcs", k.reshape(*q.shape[:3], *k.shape[2:])
    return jnp.einsum(form, q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


@dataclass(frozen=True, kw_only=True)
class Scoring(Policy):
    """Base class of policies that score. `scores` scores per query head, and `pool` combines them per choosing head."""

    def scores(self, chunk: Chunk) -> Float[Array, "B K _ C S"]:
        """Scores [B, K, G, C, S], or [B, K, 1, C, S] where a group shares them; higher is read first."""
        raise TypeError(f"{type(self).__name__} must define scores")

    def pool(self, scores: Float[Array, "B K _ C S"], chunk: Chunk) -> Float[Array, "B _ C S"]:
        """Scores per choosing head, [B, K, C, S] or [B, H, C, S]; by default the maximum over the group."""
        return largest_in_group(scores)

    def log_weights(self, chunk: Chunk) -> Float[Array, "B _ C S"]:
        """The logarithm of the estimated attention weight of each key, per choosing head, for the allocation top_p.

        By default it is the softmax of the scores over the keys that a row may see, the mean over the query heads of
        the group. So p is the share of all their attention together.
        """
        return mean_over_group(estimate_weights(self.scores(chunk), chunk.allowed, chunk.sink_logits))

    def __call__(self, chunk: Chunk) -> Float[Array, "B _ C S"]:
        """What selection compares: the pooled scores, or under top_p the logarithms of estimated weights.

        Raises ValueError for scores of another shape than `scores` and `pool` name.
        """
        batch, kv_heads, group, rows, keys = chunk.logits.shape
        if chunk.allocation == "top_p":
            found = self.log_weights(chunk)
        else:
            scores = self.scores(chunk)
            self._require_shape("scores", scores, *((batch, kv_heads, size, rows, keys) for size in (group, 1)))
            found = self.pool(scores, chunk)
        shapes = [(batch, heads, rows, keys) for heads in (kv_heads, kv_heads * group)]
        self._require_shape("pooled scores", found, *shapes)
        return found

    def _require_shape(self, name: str, scores: Array, *shapes: tuple[int, ...]) -> None:
        """Raise ValueError where scores have none of these shapes."""
        if scores.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise ValueError(f"the {name} of the policy {self.name} are {list(scores.shape)}, not {wanted}")

    @property
    def predictor_pooling(self) -> str | None:
        """How the predictor's scores alone are pooled: as `pallas_kernels.importance_scores` names it, or its offset.

        None, the default, where the policy needs anything else. With a name, decoding scores a block of layers before
        these layers run.
        """
        return None


def normalise(
    scores: Float[Array, "B K G C S"],
    keys: Bool[Array, "B C S"],
    sink_logits: Float[Array, "1 K G 1 1"] | None = None,
) -> Float[Array, "B K G C S"]:
    """Subtract each head's log-sum-exp over the given keys of a row, which makes the heads of a group comparable.

    The head's attention sink counts in it where it is given.

    A group of one head is unchanged. So is a head whose log-sum-exp is not finite: one without keys, or with a score of
    +inf or NaN.
    """
    return scores if scores.shape[2] == 1 else subtract_total(scores, keys, sink_logits)


def subtract_total(
    scores: Float[Array, "B K G C S"],
    keys: Bool[Array, "_ C S"],
    sink_logits: Float[Array, "1 K G 1 1"] | None = None,
) -> Float[Array, "B K G C S"]:
    """As `normalise`, in groups of one head too."""
    total = log_total(jnp.where(keys[:, None, None], scores, -jnp.inf), sink_logits)
    return scores - jnp.where(jnp.isfinite(total), total, 0.0)


def log_total(
    scores: Float[Array, "B K G C S"], sink_logits: Float[Array, "1 K G 1 1"] | None = None
) -> Float[Array, "B K G C 1"]:
    """The log-sum-exp of every row, its head's sink included."""
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return total if sink_logits is None else jnp.logaddexp(total, sink_logits)


def estimate_weights(
    scores: Float[Array, "B K G C S"],
    keys: Bool[Array, "_ C S"],
    sink_logits: Float[Array, "1 K G 1 1"] | None = None,
) -> Float[Array, "B K G C S"]:
    """The logarithms of the softmax of each row over the given keys and the head's attention sink.

    NaN counts as -inf, and inf as the largest number. A row without finite scores is unchanged.
    """
    scores = jnp.minimum(jnp.where(jnp.isnan(scores), -jnp.inf, scores), jnp.finfo(scores.dtype).max)
    return subtract_total(scores, keys, sink_logits)


def largest_in_group(scores: Float[Array, "B K G C S"]) -> Float[Array, "B K C S"]:
    """The maximum over the query heads of each group, head after head: XLA's reduction of this axis is slow on CPU."""
    return functools.reduce(jnp.maximum, jnp.unstack(scores, axis=2))


def mean_over_group(log_weights: Float[Array, "B K G C S"]) -> Float[Array, "B K C S"]:
    """The logarithm of the mean of the weights over the query heads of each group."""
    return jax.nn.logsumexp(log_weights, axis=2) - jnp.log(jnp.float32(log_weights.shape[2]))


def per_query_head(scores: Float[Array, "B K G C S"]) -> Float[Array, "B H C S"]:
    """The scores with one axis for all query heads, for a policy whose heads share no choice."""
    batch, kv_heads, group, *rest = scores.shape
    return scores.reshape(batch, kv_heads * group, *rest)
