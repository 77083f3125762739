"""How far a predictor's numbers are those that it is trained to predict: a reliability diagram's sums.

A predictor with an offset predicts the error in the residual stream that follows from not reading a key
(`butler_jax.policies.residual`); without one it predicts attention weights among the contested keys of a head. A
tolerance compares these numbers between heads and layers, so they have to be true on the mean, not only in order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from butler_jax.policies import Chunk, OracleResidual, TokenButler, estimate_weights, largest_in_group
from butler_jax.predictors import Predictor

PLACES = 4  # bins of each power of ten
LOWEST, HIGHEST = -8, 2  # the powers of ten that have bins
BINS = PLACES * (HIGHEST - LOWEST)


def sum_reliability(
    policy: TokenButler,
    scores: Float[Array, "B K G C S"],
    chunk: Chunk,
    counted: Bool[Array, "B C"],
    predictor: Predictor,
) -> Float[Array, "2 3 BINS B"]:
    """What the policy predicts for the contested keys of the counted rows, and what is true, in bins by the first.

    Both are the maximum over the query heads of a group.

    Args:
        scores: What the policy's `scores` gave.
        chunk: Under the selection that will choose.

    Returns:
        For keys, and for the sums over all keys of a row and KV head: how many there are, and the sums of what is
        predicted and of what is true.
    """
    target = predictor.config.target
    if target == "attention":
        logs = (largest_in_group(estimate_weights(a, chunk.contested)) for a in (scores, chunk.logits))
    else:
        oracle = OracleResidual(error=target)
        logs = policy.pool(scores, chunk), oracle.pool(oracle.scores(chunk), chunk)
    keys = (chunk.contested & counted[..., None])[:, None]
    predicted, true = (jnp.where(keys, jnp.exp(a), 0.0) for a in logs)
    totals = (jnp.sum(a, axis=-1, keepdims=True) for a in (predicted, true))
    each = _sum_bins(predicted, true, keys), _sum_bins(*totals, jnp.any(keys, axis=-1, keepdims=True))
    return jnp.moveaxis(jnp.stack(each), 1, -1)


def _sum_bins(
    predicted: Float[Array, "B K C S"], true: Float[Array, "B K C S"], inside: Bool[Array, "B _ C S"]
) -> Float[Array, "B 3 BINS"]:
    """The numbers inside, and the sums of both values, by the first of them."""
    place = jnp.floor(PLACES * (jnp.log10(jnp.maximum(predicted, 10.0**LOWEST)) - LOWEST))
    place = jnp.clip(place.astype(jnp.int32), 0, BINS - 1)
    inside = jnp.broadcast_to(inside, predicted.shape)

    def one(place, *values):
        return jnp.stack([jnp.zeros(BINS, jnp.float32).at[place.ravel()].add(value.ravel()) for value in values])

    return jax.vmap(one)(place, inside.astype(jnp.float32), predicted, true)


def mean_reliability(sums: Float[np.ndarray, "2 3 BINS"]) -> list[dict[str, list[float]]]:
    """The means of the bins: "predicted", "true" and "count", for keys and for the sums of a row.

    Bins without anything are left out, and so are those without anything above 0, or with what is not finite.
    """
    found = []
    for bins in sums:
        held = np.isfinite(bins).all(axis=0) & (bins > 0).all(axis=0)
        count, *totals = bins[:, held]
        predicted, true = ((total / count).tolist() for total in totals)
        found.append({"predicted": predicted, "true": true, "count": count.tolist()})
    return found
