"""Scores of the cached tokens: the predictor's for a block of layers before they run, and what a policy ranks by.

q_imp and k_imp come from the very functions that training differentiates. The newest token's own k_imp is known in its
layer only, where its score joins those of the cached tokens.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.decoding.newest_tokens import Newest
from butler_jax.decoding.parts import part_of
from butler_jax.decoding.plan import Plan
from butler_jax.decoding.score_cache import ScoreCache, layers_scored, place_scored
from butler_jax.model import BaseConfig, BaseModel, LayerView, soft_cap, weights_of
from butler_jax.parallel import by_rows_and_heads, token_axis
from butler_jax.policies import Chunk, scaled_products
from butler_jax.predictors import Predictor, at, schedule, walk
from butler_jax.selection import Rows
from pallas_kernels import contested_range, importance_scores, importance_totals


def q_imp_of_block(
    predictor: Predictor, model: BaseModel, features: Any, context: Any, layers: Int[Array, " P"]
) -> tuple[Float[Array, "P B H R"], Float[Array, "P B H"] | None]:
    """q_imp and offset of one token a row for P layers, all from one producer's features.

    A predictor's queries and offsets may look at a layer's index and weights: nothing else of the layer exists yet.
    """

    def one(head, weights, layer):
        view = LayerView(layer, weights, *[None] * 5)
        offset = predictor.offset(head, features, view, context)
        return predictor.q_imp(head, features, view, context)[:, 0], None if offset is None else offset[:, 0]

    heads = jax.tree.map(operator.itemgetter(schedule(predictor, layers).head), predictor.heads)
    return jax.vmap(one)(heads, weights_of(model, layers), layers)


class BlockQueries(NamedTuple):
    """What scores the cached tokens of a block of P layers, with N = B * P rows as `pallas_kernels` takes P layers.

    Attributes:
        k_imp: The cache.
        places: Of the layers in it.
        q_imp: Queries.
        offset: Of the predictor, which is added to the scores of each head; None where it has none.
        scales: Of k_imp in int8; None where it is not.
    """

    k_imp: Float[Array, "L B Q R S"]
    places: Int[Array, " P"]
    q_imp: Float[Array, "N K G R"]
    offset: Float[Array, "N K G"] | None
    scales: Float[Array, "N Q"] | None

    @classmethod
    def of(
        cls,
        q_imp: Float[Array, "P B H R"],
        offset: Float[Array, "P B H"] | None,
        layers: Int[Array, " P"],
        scores: ScoreCache,
        base: BaseConfig,
    ) -> BlockQueries:
        """The queries and offsets of `q_imp_of_block`, beside the cache."""
        places, groups = place_scored(base, layers), (base.kv_heads, base.group)
        scales = None if scores.scales is None else _by_rows(scores.scales[places])
        q_imp = _by_rows(q_imp).reshape(-1, *groups, q_imp.shape[-1])
        offset = None if offset is None else _by_rows(offset).reshape(-1, *groups)
        return cls(scores.k_imp, places, q_imp, offset, scales)

    @property
    def splits(self) -> tuple[str, ...]:
        """How `by_rows_and_heads` splits the fields."""
        return ("-bh-s", "-", "bh--", "bh-", "bh")

    def options(self, pooling: str) -> dict[str, Any]:
        """Those of `importance_scores` and `choose_by_importance`; pooling: as a policy's `predictor_pooling`."""
        pooling = "normalised" if pooling in ("normalised", "share") else "maximum"
        return dict(pooling=pooling, offset=self.offset, scales=self.scales, layer=self.places)


def _by_rows(x: Float[Array, "P B ..."]) -> Float[Array, "N ..."]:
    """The layers of each row one after the other."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def pooled_scores(
    queries: BlockQueries,
    lengths: Int[Array, " N"],
    first: Int[Array, " N"] | None,
    plan: Plan,
) -> Float[Array, "N K S"]:
    """The score of every cached token of P layers, pooled over the group, where the scores are needed themselves.

    With an offset, scores are logarithms of errors: the offset of each head is added before the maximum is taken.
    Sinks and recent tokens are read whatever their score: the log-sum-exp that pooling subtracts leaves them out. Where
    the mesh splits the tokens, every device scores its part, and the parts agree on one log-sum-exp.

    Args:
        lengths, first: Of the tokens that the rows see.
    """
    selection, pooling = plan.selection, plan.policy.predictor_pooling
    capacity = queries.k_imp.shape[-1]
    axis = token_axis(capacity)
    begin, contested = contested_range(lengths, first, selection.sinks, selection.recent)

    def run(contested, begin, *fields):
        queries = BlockQueries(*fields)
        part = part_of(queries.k_imp.shape[-1], axis)
        if part is not None:
            contested, begin = part.count(contested), part.count(begin)
        options = queries.options(pooling) | dict(first=begin, implementation=plan.implementation)
        operands = queries.q_imp, queries.k_imp, contested
        if part is not None and options["pooling"] == "normalised":
            known = {name: options[name] for name in ("first", "scales", "layer", "implementation")}
            options["totals"] = part.log_sum(importance_totals(*operands, **known))
        return importance_scores(*operands, **options)

    sizes = dict(rows=queries.k_imp.shape[1], heads=queries.q_imp.shape[1], tokens=capacity)
    split = by_rows_and_heads(run, ("b", "b", *queries.splits), "bhs", **sizes)
    return split(contested, begin, *queries)


def raw_scores(q_imp: Float[Array, "P B H R"], k_imp: Float[Array, "P B Q R S"]) -> Float[Array, "P B Q G S"]:
    """q_imp . k_imp / sqrt(R), float32, of every place in the cache, held or not."""
    layers, batch, _, rank = q_imp.shape
    grouped = q_imp.reshape(layers, batch, k_imp.shape[2], -1, rank)
    return jnp.einsum("pbqgr,pbqrs->pbqgs", grouped, k_imp, preferred_element_type=jnp.float32) * rank**-0.5


def with_own_score(
    scores: Float[Array, "B Q G S"], q_imp: Float[Array, "B H R"], k_imp: Float[Array, "B Q R"], newest: Newest
) -> Float[Array, "B Q G S"]:
    """The scores of one layer with the newest token's own at its place."""
    own = raw_scores(q_imp[None], k_imp[None, ..., None])[0]
    place = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None] == newest.cached[:, None]
    return jnp.where(place[:, None, None], own, scores)


def chunk_of(
    view: LayerView,
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    newest: Newest,
    predicted: Float[Array, "B Q G S"] | None,
    offset: Float[Array, "B H"] | None,
) -> Chunk:
    """What a policy sees of the newest token of each row, as it sees a row of a whole sequence.

    Args:
        predicted: The predictor's scores, the newest token's own included.
        offset: The predictor's offset of the newest row.
    """
    cached, first = newest.cached, newest.first(view.index)
    size, kv_heads = k.shape[2], k.shape[1]
    row = jnp.arange(cached.shape[0])
    k = k.astype(view.q.dtype).at[row, :, cached].set(view.k[:, 0])
    v = v.astype(view.v.dtype).at[row, :, cached].set(view.v[:, 0])
    batch, _, heads, dim = view.q.shape
    q = view.q[:, 0].reshape(batch, kv_heads, heads // kv_heads, 1, dim)
    columns = jnp.arange(size, dtype=jnp.int32)
    allowed = columns[None] <= cached[:, None]
    if first is not None:
        allowed &= columns[None] >= first[:, None]
    if predicted is not None:
        predicted = predicted.reshape(batch, kv_heads, heads // kv_heads, 1, size)
    return Chunk(
        layer=view.index,
        weights=view.weights,
        x=view.x,
        q=q * jnp.asarray(dim**-0.5, q.dtype),
        k=k,
        v=v,
        logits=soft_cap(scaled_products(q, k), view.softcap),
        predicted=predicted,
        offset=None if offset is None else offset.reshape(batch, kv_heads, -1, 1, 1),
        rows=Rows(cached[:, None], jnp.zeros_like(cached)[:, None]),
        columns=columns,
        allowed=allowed[:, None],
        starts=jnp.zeros((batch, size), jnp.int32),
    )


def empty_scores(predictor: Predictor, model: BaseModel, batch: int, capacity: int, dtype: Any) -> ScoreCache:
    """A score cache of zeros for `capacity` tokens a row."""
    config = model.config
    token = jax.ShapeDtypeStruct((batch, 1, config.width), dtype)

    def key(x):
        context = predictor.context(jnp.zeros((batch, 1), jnp.int32))
        state = walk.begin(predictor, x, context)
        keys = jnp.zeros((batch, 1, config.kv_heads, config.head_dim), dtype)
        queries = jnp.zeros((batch, 1, config.heads, config.head_dim), dtype)
        layer = config.served_layers[0]
        view = LayerView(jnp.asarray(layer), weights_of(model, layer), x, queries, keys, keys, keys)
        return predictor.k_imp(at(predictor.heads, 0), state.read, view, context)[:, 0]

    shape = jax.eval_shape(key, token)
    k_imp = jnp.zeros((len(layers_scored(config)), *shape.shape, capacity), shape.dtype)
    return ScoreCache(k_imp, walk.empty_cache(predictor, batch, capacity, dtype))
