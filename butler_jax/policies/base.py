"""What every policy is: scores of the keys for a chunk of query rows. Choosing is selection's business."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import BaseConfig
from butler_jax.selection import Rows, SelectionConfig, always_chosen

if TYPE_CHECKING:
    from butler_jax.model import BaseModel


class Chunk(NamedTuple):
    """C query rows of one layer and the S keys they may see; the G query heads of a group share a KV head.

    layer: its index, from 0. q (times D**-0.5) and k: after rotary. logits: q . k, scaled in float32, every key,
    masked or not. importance: the predictor's scores in the layout of logits, None without a predictor. rows:
    the queries' columns. columns: positions of the keys along the sequence. allowed: which keys a row may see
    (batch 1 without documents). starts: the column where each key's document begins. sinks, recent: of the selection
    that will choose.
    """

    layer: Int[Array, ""]
    q: Float[Array, "B K G C D"]
    k: Float[Array, "B K S D"]
    logits: Float[Array, "B K G C S"]
    importance: Float[Array, "B K G C S"] | None
    rows: Rows
    columns: Int[Array, " S"]
    allowed: Bool[Array, "B C S"]
    starts: Int[Array, "B S"]
    sinks: int = 0
    recent: int = 0

    @property
    def contested(self) -> Bool[Array, "B C S"]:
        """The keys that scores decide about: allowed, and neither sinks nor in the recent."""
        return self.allowed & ~always_chosen(self.rows, self.columns, self.sinks, self.recent)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base class: a frozen dataclass whose fields are the policy's hyper-parameters.

    `scores` gives [B, K, G or 1, C, S] (higher is read first, 1: the same for the whole group) and `pool`
    makes of them what is selected by: [B, K, C, S], or [B, H, C, S] for a policy that chooses per query
    head.
    """

    name: ClassVar[str]
    needs_predictor: ClassVar[bool] = False
    evicts: ClassVar[bool] = False  # see evicting.py
    once: ClassVar[bool] = False  # likewise
    form: ClassVar[str] = ""  # how it differs from what was published, for reports

    def scores(self, chunk: Chunk) -> Float[Array, "B K G C S"]:
        """Scores per query head, before pooling."""
        raise TypeError(f"{type(self).__name__} must define scores")

    def pool(self, scores: Float[Array, "B K G C S"], chunk: Chunk) -> Float[Array, "B K C S"]:
        """Scores per KV head; default: the maximum over the group."""
        return jnp.max(scores, axis=2)

    def prepare(self, model: BaseModel, batches: Sequence[dict[str, np.ndarray]]) -> Policy:
        """The policy with what it has to find out about a model on some text; default: nothing."""
        return self

    def numbers_read_per_key(self, base: BaseConfig, predictor: Any) -> float:
        """Numbers read of each cached token and KV head to choose, before anything is attended; default: none."""
        return 0.0

    def selection(self, config: SelectionConfig) -> SelectionConfig:
        """The selection under which the policy is used; default: what was asked for."""
        return config

    def __call__(self, chunk: Chunk) -> Float[Array, "B K C S"]:
        """The scores that selection takes."""
        return self.pool(self.scores(chunk), chunk)


def normalise(scores: Float[Array, "B K G C S"], keys: Bool[Array, "B C S"]) -> Float[Array, "B K G C S"]:
    """Scores less each head's own log-sum-exp over the given keys of each row, so that heads of a group compare.

    A group of one has nothing to compare and is left as it is; so is a head whose log-sum-exp is not finite: without
    given keys, or with scores of +inf or NaN among them.
    """
    if scores.shape[2] == 1:
        return scores
    total = jax.nn.logsumexp(jnp.where(keys[:, None, None], scores, -jnp.inf), axis=-1, keepdims=True)
    return scores - jnp.where(jnp.isfinite(total), total, 0.0)


def per_query_head(scores: Float[Array, "B K G C S"]) -> Float[Array, "B H C S"]:
    """One row of scores a query head: a policy that chooses so lets no head share."""
    batch, kv_heads, group, *rest = scores.shape
    return scores.reshape(batch, kv_heads * group, *rest)


def describe(policy: Policy) -> dict[str, Any]:
    """Name and hyper-parameters, for reports; what was found on text is left out."""
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {"name": policy.name, **{f: value for f, value in settings.items() if not isinstance(value, np.ndarray)}}
