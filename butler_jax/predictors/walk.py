"""A predictor along the layers: capture at a producer layer, features at the start of a block, reuse within.

The one place where the schedule is carried out. Inside a mixer of `base_model.run_layers`:

    state = walk.begin(predictor, x, context)
    step = walk.step(predictor, state, view, context, attend)      for every layer
    q_imp = predictor.q_imp(step.head, step.features, view, context)

It serves whole sequences (no cache) and one-token decoding (a trunk that attends keeps a cache) alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from butler_jax.model import LayerView, few_tokens
from butler_jax.predictors.base import Context, Predictor, Schedule, at, schedule

TrunkAttend = Callable[[Any, Array, Array, Array], tuple[Array, Any]]
"""(this producer's cache or None, q, k, v each [B,T,H',D']) -> (output, new cache or None)."""


class Walk(NamedTuple):
    """What is carried from layer to layer.

    captured: what the latest producer layer handed over. features: of the block's producer; None where they
    are the captured stream itself. cache: of the trunks' attention, stacked over producers; None without.
    """

    captured: Float[Array, "B T E"]
    features: Any
    cache: Any


class Step(NamedTuple):
    """A layer's part of the predictor: its head's parameters, its producer's features, its place."""

    head: Any
    features: Any
    place: Schedule
    state: Walk


def begin(predictor: Predictor, x: Float[Array, "B T E"], context: Context, cache: Any = None) -> Walk:
    """The state before layer 0. x: any array of the shape and dtype of the residual stream.

    cache: predictor.trunk_cache stacked over the N producers when decoding, None for a pass over whole
    sequences.
    """
    captured = jnp.zeros_like(x)
    if predictor.trunk is None:
        return Walk(captured, None, None)

    def features(trunk):
        def attend(q, k, v):
            return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype), None

        return predictor.features(trunk, captured, context, attend, None)[0]

    shapes = jax.eval_shape(features, jax.eval_shape(lambda: at(predictor.trunk, 0)))
    return Walk(captured, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), cache)


def step(
    predictor: Predictor,
    state: Walk,
    view: LayerView,
    context: Context,
    attend: TrunkAttend,
    dropout: Key[Array, ""] | None = None,
) -> Step:
    """The predictor at the layer in view, and the state for the next layer.

    Layer 0 gets head 0 and means nothing there (place.serves is false): it is always dense. attend: how a
    trunk with an attention of its own reaches earlier tokens; called once a block.
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
    return Step(at(predictor.heads, place.head), features, place, Walk(captured, kept, cache))
