"""Whether the scores of a policy are numbers. NaN counts as -inf where scores are compared: nothing else shows it."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.data import as_batch
from butler_jax.model import BaseModel
from butler_jax.parallel import on_host
from butler_jax.policies import Scoring
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation.chunks import sum_chunks
from butler_jax.simulation.programs import compiled


def measure_nan_scores(
    model: BaseModel, predictor: Predictor | None, batch: dict[str, np.ndarray], policy: Scoring
) -> float:
    """The share of scores that are NaN in a dense pass: of the keys that scores decide about, in the served layers.

    Args:
        predictor: Needed by policies with `needs_predictor`.
        batch: tokens, segments, positions [B, T].
    """
    rule = (policy.selection(SelectionConfig()) or SelectionConfig()).rule
    sums = _count(model, predictor, as_batch(batch), policy=policy, rule=rule)
    nan, scored = (on_host(a).astype(np.float64)[list(model.config.served_layers)].sum() for a in sums)
    return float(nan / max(scored, 1.0))


@partial(compiled, static_argnames=("policy", "rule"))
def _count(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    *,
    policy: Scoring,
    rule: SelectionConfig,
) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
    """How many scores are NaN in every layer, and how many there are."""

    def one(chunk):
        chunk = chunk.under(rule)
        scores = policy(chunk)
        decided = jnp.broadcast_to(chunk.contested[:, None], scores.shape)
        return tuple(jnp.sum(a, dtype=jnp.int32).astype(jnp.float32) for a in (jnp.isnan(scores) & decided, decided))

    return sum_chunks(model, predictor, batch, one)
