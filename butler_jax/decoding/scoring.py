"""Scores of the cached tokens while decoding: those of a block of layers are issued together, before its layers run.

The predictor's queries and keys come from the very functions that training differentiates. The newest token's own
importance key is only known in its layer, where its score joins those of the cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.decoding.cache import ScoreCache
from butler_jax.decoding.score_cache import restored
from butler_jax.model import BaseModel, LayerView
from butler_jax.policies import Chunk
from butler_jax.predictors import Predictor, at, walk
from butler_jax.selection import Chosen, Rows

UNROLLED = 8  # layers of a block that are scored without a loop

Score = Callable[[Float[Array, "B K G R"], Int[Array, ""]], Float[Array, "B K S"]]
Choose = Callable[[Float[Array, "B P K S"], Int[Array, " P"]], Chosen]


class Ahead(NamedTuple):
    """What is known of a block of P layers before they run.

    queries: importance queries. chosen: the units of every layer, [P, B, K, N]; None where the policy looks at more
    than the predictor. scores: of the cached tokens, per query head and before any pooling; None where nobody asks.
    """

    queries: Float[Array, "P B H R"]
    chosen: Chosen | None
    scores: Float[Array, "P B Q G S"] | None


def queries_of(predictor: Predictor, model: BaseModel, features: Any, context: Any, index: Int[Array, " P"]):
    """Importance queries [P, B, H, R] of the layers `index`, all from one producer's features of one token a row.

    A predictor's queries may look at a layer's index and weights: nothing else of it exists yet.
    """

    def one(head, weights, layer):
        view = LayerView(layer, weights, *[None] * 5)
        return predictor.q_imp(head, features, view, context)[:, 0]

    heads = jax.tree.map(lambda a: a[jnp.minimum(index - 1, a.shape[0] - 1)], predictor.heads)
    return jax.vmap(one)(heads, jax.tree.map(lambda a: a[index], model.layers), index)


def issue(
    predictor: Predictor,
    model: BaseModel,
    features: Any,
    context: Any,
    index: Int[Array, ""],
    scores: ScoreCache,
    *,
    score: Score | None,
    choose: Choose | None,
    raw: bool,
) -> Ahead:
    """The block of layers that starts at `index`; what it says beyond the last layer means nothing.

    score: pooled scores of one layer. choose: from those of the block to its units. Both None: nothing is chosen yet.
    raw: whether scores per query head are wanted.
    """
    layers = jnp.minimum(index + jnp.arange(predictor.stride, dtype=jnp.int32), model.config.layers - 1)
    queries = queries_of(predictor, model, features, context, layers)
    chosen = None
    if score is not None:
        grouped = queries.reshape(*queries.shape[:2], model.config.kv_heads, model.config.group, -1)
        if predictor.stride <= UNROLLED:
            pooled = jnp.stack([score(grouped[p], layers[p]) for p in range(predictor.stride)], axis=1)
        else:
            pooled = jnp.swapaxes(jax.lax.map(lambda one: score(*one), (grouped, layers)), 0, 1)
        chosen = choose(pooled, layers)
    keys = restored(scores.k_imp[layers], None if scores.scales is None else scores.scales[layers])
    return Ahead(queries, chosen, raw_scores(queries, keys) if raw else None)


def raw_scores(queries: Float[Array, "P B H R"], keys: Float[Array, "P B Q R S"]) -> Float[Array, "P B Q G S"]:
    """query . key / sqrt(R), float32, of every place in the cache, held or not."""
    layers, batch, _, rank = queries.shape
    grouped = queries.reshape(layers, batch, keys.shape[2], -1, rank)
    return jnp.einsum("pbqgr,pbqrs->pbqgs", grouped, keys, preferred_element_type=jnp.float32) * rank**-0.5


def with_own(
    scores: Float[Array, "B Q G S"],
    query: Float[Array, "B H R"],
    key: Float[Array, "B Q R"],
    cached: Int[Array, " B"],
) -> Float[Array, "B Q G S"]:
    """The scores of one layer with the newest token's own at its place."""
    own = raw_scores(query[None], key[None, ..., None])[0]
    place = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None] == cached[:, None]
    return jnp.where(place[:, None, None], own, scores)


def chunk_of(
    view: LayerView,
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    cached: Int[Array, " B"],
    first: Int[Array, " B"] | None,
    scores: Float[Array, "B Q G S"] | None,
) -> Chunk:
    """What a policy sees of the newest token of each row: the same as it sees of a row of a whole sequence.

    keys, values: of this layer, cached. scores: the predictor's, the newest token's own included.
    """
    size, kv_heads = keys.shape[2], keys.shape[1]
    row = jnp.arange(cached.shape[0])
    keys = keys.astype(view.q.dtype).at[row, :, cached].set(view.k[:, 0])
    values = values.astype(view.v.dtype).at[row, :, cached].set(view.v[:, 0])
    batch, _, heads, dim = view.q.shape
    q = view.q[:, 0].reshape(batch, kv_heads, heads // kv_heads, 1, dim)
    logits = jnp.einsum("bkgcd,bksd->bkgcs", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
    columns = jnp.arange(size, dtype=jnp.int32)
    allowed = columns[None] <= cached[:, None]
    if first is not None:
        allowed &= columns[None] >= first[:, None]
    if scores is not None:
        scores = scores.reshape(batch, kv_heads, heads // kv_heads, 1, size)
    rows = Rows(cached[:, None], jnp.zeros_like(cached)[:, None])
    starts = jnp.zeros((batch, size), jnp.int32)
    q = q * jnp.asarray(dim**-0.5, q.dtype)
    return Chunk(
        layer=view.index,
        weights=view.weights,
        x=view.x,
        q=q,
        k=keys,
        v=values,
        logits=logits,
        predicted=scores,
        rows=rows,
        columns=columns,
        allowed=allowed[:, None],
        starts=starts,
    )


def empty_scores(predictor: Predictor, model: BaseModel, batch: int, capacity: int, dtype: Any) -> ScoreCache:
    """A score cache of zeros for `capacity` tokens a row."""
    config = model.config
    token = jax.ShapeDtypeStruct((batch, 1, config.width), dtype)

    def key(x):
        context = predictor.context(jnp.zeros((batch, 1), jnp.int32), capacity)
        state = walk.begin(predictor, x, context)
        keys = jnp.zeros((batch, 1, config.kv_heads, config.head_dim), dtype)
        queries = jnp.zeros((batch, 1, config.heads, config.head_dim), dtype)
        view = LayerView(jnp.asarray(1), at(model.layers, 1), x, queries, keys, keys, keys)
        features = state.captured if state.features is None else state.features
        return predictor.k_imp(at(predictor.heads, 0), features, view, context)[:, 0]

    shape = jax.eval_shape(key, token)
    keys = jnp.zeros((config.layers, *shape.shape, capacity), shape.dtype)
    trunk = predictor.trunk_cache(batch, capacity, dtype)
    return ScoreCache(keys, jax.tree.map(lambda a: jnp.broadcast_to(a[None], (predictor.producers, *a.shape)), trunk))
