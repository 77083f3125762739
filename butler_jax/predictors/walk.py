"""A predictor along the layers: it captures at a producer layer and computes features once for a block.

Every pass runs a predictor by these two functions, inside a mixer of `run_layers`:

    state = walk.begin(predictor, x, context)                      before layer 0
    step = walk.advance(predictor, state, view, context, attend)   at every layer
    q_imp = predictor.q_imp(step.head, step.features, view, context)

A pass over whole sequences has no cache. Decoding has one where the trunk attends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from butler_jax.model import LayerView, few_tokens
from butler_jax.predictors.base import Context, Predictor, Schedule, at, schedule, zeros_of

TrunkAttend = Callable[[Any, Array, Array, Array], tuple[Array, Any]]
"""(the producer's cache or None, q, k, v) -> (output, the new cache or None); q, k, v, output [B, T, heads, dim]."""


class Walk(NamedTuple):
    """The predictor's state from layer to layer.

    Attributes:
        captured: What `capture` returned at the latest producer layer.
        features: Of the block's producer; None where they are the captured stream itself.
        cache: Of the trunks' attention, stacked over the producers; None without a cache.
    """

    captured: Float[Array, "B T E"]
    features: Any
    cache: Any

    @property
    def read(self) -> Any:
        """What the heads of the block read: the features, or the captured stream itself."""
        return self.captured if self.features is None else self.features


class WalkStep(NamedTuple):
    """The predictor at one layer: the head's parameters, the producer's features, the place and the next state."""

    head: Any
    features: Any
    place: Schedule
    state: Walk


def begin(predictor: Predictor, x: Float[Array, "B T E"], context: Context, cache: Any = None) -> Walk:
    """The state before layer 0.

    x: any array of the residual stream's shape and dtype. cache: in decoding, as `empty_cache` makes it.
    """
    captured = jnp.zeros_like(x)
    if predictor.trunk is None:
        return Walk(captured, None, None)

    def features(trunk):
        def attend(q, k, v):
            return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype), None

        return predictor.features(trunk, captured, context, attend, None)[0]

    return Walk(captured, zeros_of(features, jax.eval_shape(lambda: at(predictor.trunk, 0))), cache)


def empty_cache(predictor: Predictor, batch: int, capacity: int, dtype: Any) -> Any:
    """The empty cache of the trunks' attention, stacked over the producers; None where they have none."""
    trunk = predictor.trunk_cache(batch, capacity, dtype)
    return jax.tree.map(lambda a: jnp.broadcast_to(a[None], (predictor.producers, *a.shape)), trunk)


def advance(
    predictor: Predictor,
    state: Walk,
    view: LayerView,
    context: Context,
    attend: TrunkAttend,
    dropout: Key[Array, ""] | None = None,
) -> WalkStep:
    """Run the predictor at the layer in view; `attend` is called once for each block, for a trunk that attends.

    A layer that is not served gets head 0, whose output must not be used (place.serves is false). dropout: a key in
    training.
    """
    place = schedule(predictor, view.index)
    features, cache = state.captured, state.cache
    if predictor.trunk is not None:

        def fresh():
            own = None if state.cache is None else at(state.cache, place.producer)
            made, new = predictor.features(
                at(predictor.trunk, place.producer), state.captured, context, partial(attend, own), dropout
            )
            if state.cache is None:
                return made, None
            write = partial(jax.lax.dynamic_update_index_in_dim, index=place.producer, axis=0)
            return made, jax.tree.map(lambda whole, one: write(whole, one), state.cache, new)

        features, cache = jax.lax.cond(place.starts, fresh, lambda: (state.features, state.cache))
    captured = few_tokens(jnp.where(place.captures, predictor.capture(view), state.captured))
    kept = None if predictor.trunk is None else features
    return WalkStep(at(predictor.heads, place.head), features, place, Walk(captured, kept, cache))
