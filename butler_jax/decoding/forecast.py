"""Score: what the predictor says of a layer before its attention runs.

The predictor walks along the layers beside the model. At the first layer of a block it scores the cached tokens for all
P served layers of the block at once; where its scores alone decide, the block's choice is made there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.decoding.cached_attention import attend_cached
from butler_jax.decoding.choice import Chooser
from butler_jax.decoding.layer_forecast import LayerForecast
from butler_jax.decoding.newest_tokens import Newest
from butler_jax.decoding.score_cache import ScoreCache, place_scored, restored
from butler_jax.decoding.scoring import BlockQueries, q_imp_of_block, raw_scores, with_own_score
from butler_jax.decoding.store import KVStore
from butler_jax.model import BaseModel, LayerView, is_served
from butler_jax.predictors import Predictor, at, schedule, walk, zeros_of
from butler_jax.selection import Chosen


class BlockForecast(NamedTuple):
    """What is known of a block of P layers before they run.

    Attributes:
        q_imp: Queries of the predictor.
        chosen: Units of every layer, [P, B, K, N]; None where the policy looks at more than the predictor.
        scores: Of the cached tokens, per query head and before any pooling; None where nothing asks for them.
        offset: Of the predictor, for every query head; None where it has none.
    """

    q_imp: Float[Array, "P B H R"]
    chosen: Chosen | None
    scores: Float[Array, "P B Q G S"] | None
    offset: Float[Array, "P B H"] | None


class Forecasts(NamedTuple):
    """What is carried from layer to layer: the predictor's walk, the block's forecast, rows that travel ahead."""

    walk: Any = None
    block: BlockForecast | None = None
    rows: Any = None


@dataclass(frozen=True)
class Forecaster:
    """The predictor beside one decode step; without a predictor it knows nothing.

    Attributes:
        model: The base model.
        predictor: The predictor, or None.
        context: The predictor's context of the new tokens, the same for every layer.
        scores: Its cache.
        chooser: Chooses from its scores where they alone decide.
        per_head: Whether scores per query head are asked for.
        every_step: Whether every step scores, also between the choices of an interval.
    """

    model: BaseModel
    predictor: Predictor | None
    context: Any
    scores: ScoreCache | None
    chooser: Chooser
    per_head: bool
    every_step: bool

    @property
    def newest(self) -> Newest:
        """Where the new tokens stand."""
        return self.chooser.newest

    @property
    def kv(self) -> KVStore:
        """Keys and values, from which rows are fetched ahead."""
        return self.chooser.kv

    @property
    def ahead(self) -> bool:
        """Whether the choice of a block is made before it runs."""
        return self.chooser.plan.when == "ahead"

    def begin(self, x: Float[Array, "B 1 E"]) -> Forecasts:
        """What is carried before layer 0; x: the embeddings."""
        if self.predictor is None:
            return Forecasts()
        walked, block = walk.begin(self.predictor, x, self.context, self.scores.trunk), None
        if self.ahead or self.per_head:
            block = zeros_of(lambda: self._score_block(walked.read, jnp.asarray(0)))
        rows = zeros_of(lambda: self._fetch(jnp.asarray(0), block, jnp.asarray(0))) if self.ahead else None
        return Forecasts(walked, block, rows)

    def forecast(self, carry: Forecasts, view: LayerView) -> tuple[Forecasts, LayerForecast]:
        """What is carried on, and what is known of the layer in view."""
        if self.predictor is None:
            return carry, LayerForecast()
        step = walk.advance(self.predictor, carry.walk, view, self.context, partial(attend_trunk, self.newest.cached))
        k_imp = self.predictor.k_imp(step.head, step.features, view, self.context)[:, 0]
        block, rows, scores, offset, chosen = carry.block, carry.rows, None, None, None
        place = step.place.place
        if block is not None:
            now = step.place.starts if self.every_step else step.place.starts & self.chooser.now
            block = jax.lax.cond(now, lambda: self._score_block(step.features, view.index), lambda: block)
            if self.per_head:
                scores = with_own_score(block.scores[place], block.q_imp[place], k_imp, self.newest)
                offset = None if block.offset is None else block.offset[place]
        if self.ahead:
            chosen = at(block.chosen, place)
            if rows is not None:
                rows = jax.lax.cond(step.place.starts, lambda: self._fetch(view.index, block, place), lambda: rows)
        return Forecasts(step.state, block, rows), LayerForecast(k_imp, scores, offset, chosen, rows)

    def fetch_next(self, carry: Forecasts, view: LayerView) -> Forecasts:
        """The carry, after the fetch of the keys and values of the next served layer was begun.

        If that layer begins a block, `forecast` fetches them, after its choice.
        """
        if carry.rows is None:
            return carry
        config = self.model.config
        following = np.searchsorted(config.served_layers, np.arange(config.layers), side="right")
        layers = np.asarray(config.served_layers)[np.minimum(following, len(config.served_layers) - 1)]
        layer = jnp.asarray(layers, jnp.int32)[view.index]
        at_next = schedule(self.predictor, layer)
        fetches = ~at_next.starts
        if config.mixed:
            fetches &= is_served(config, view.index) | (view.index == 0)
        rows = jax.lax.cond(fetches, lambda: self._fetch(layer, carry.block, at_next.place), lambda: carry.rows)
        return carry._replace(rows=rows)

    def _fetch(self, layer: Int[Array, ""], block: BlockForecast, place: Int[Array, ""]) -> Any:
        """The rows that a layer will attend, as far as the block knows its choice."""
        units, _ = self.chooser.settle(layer, at(block.chosen, place))
        return self.kv.prefetch(layer, units, self.newest, self.chooser.plan.selection.unit)

    def _score_block(self, features: Any, index: Int[Array, ""]) -> BlockForecast:
        """The block that starts at layer `index`; entries beyond its last layer repeat it."""
        predictor, config = self.predictor, self.model.config
        layers = jnp.asarray(predictor.members)[schedule(predictor, index).producer]
        q_imp, offset = q_imp_of_block(predictor, self.model, features, self.context, layers)
        chosen = None
        if self.ahead:
            queries = BlockQueries.of(q_imp, offset, layers, self.scores, config)
            chosen = self.chooser.choose_block(queries, layers)
        places = place_scored(config, layers)
        scales = None if self.scores.scales is None else self.scores.scales[places]
        k_imp = restored(self.scores.k_imp[places], scales)
        return BlockForecast(q_imp, chosen, raw_scores(q_imp, k_imp) if self.per_head else None, offset)


def attend_trunk(cached: Int[Array, " B"], cache: Any, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    """Attend with one token a row over a trunk's own cache; returns the output and the cache with the token."""
    rows = jnp.arange(cached.shape[0])
    new = tuple(a.at[rows, cached].set(b[:, 0].astype(a.dtype)) for a, b in zip(cache, (k, v), strict=True))
    return attend_cached(q, k, v, *(a.transpose(0, 2, 1, 3)[None] for a in cache), 0, cached), new
