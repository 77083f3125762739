"""Decoding: prefill the caches from prompts, then one token a row and step.

The predictor's queries and keys come from the very functions that training differentiates; the score cache holds the
importance keys of every token seen.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.attention import causal_attention
from butler_jax.base_model import BaseModel, LayerView, by_window, dense_mixer, embed, logits, run_layers
from butler_jax.cache import DecodeState, KVCache, ScoreCache, empty_kv_cache
from butler_jax.configs import require
from butler_jax.predictors import Predictor, walk


def prefill(
    model: BaseModel,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    capacity: int,
    predictor: Predictor | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Run prompts densely; logits after each row's last token, and the caches of `capacity` tokens a row.

    tokens: prompts, padded on the right to T. lengths: tokens of each prompt, 1 ... T. Raises ValueError where T
    exceeds the capacity or the capacity the model's context.
    """
    batch, length = tokens.shape
    require(length <= capacity, f"prompts of {length} tokens do not fit a cache of {capacity}; raise the capacity")
    require(
        capacity <= model.config.context,
        f"a cache of {capacity} tokens is beyond the model's context of {model.config.context}",
    )
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    x = embed(model, tokens)
    dense = dense_mixer(model.config, None, implementation)
    room = capacity - length

    def trunk_attend(_, q, k, v):
        cache = tuple(jnp.pad(a, ((0, 0), (0, room), (0, 0), (0, 0))) for a in (k, v))
        return causal_attention(q, k, v, implementation=implementation), cache

    context = None if predictor is None else predictor.context(positions, capacity)

    def mixer(state, view: LayerView):
        keys = None
        if predictor is not None:
            step = walk.step(predictor, state, view, context, trunk_attend)
            keys = predictor.keys(step.head, step.features, view, context).transpose(0, 2, 3, 1)
            state = step.state
        rows = tuple(a.transpose(0, 2, 1, 3) for a in (view.k, view.v))
        return dense(None, view)[0], state, (*rows, keys)

    start = None
    if predictor is not None:
        start = walk.begin(predictor, x, context, _trunk_cache(predictor, batch, capacity, x.dtype))
    x, end, (k, v, keys) = run_layers(model, x, positions, mixer, start, length=capacity)
    kv = empty_kv_cache(model.config, batch, capacity, x.dtype)
    kv = KVCache(*(jax.lax.dynamic_update_slice(a, b, (0,) * 5) for a, b in ((kv.k, k), (kv.v, v))))
    scores = None
    if predictor is not None:
        scores = ScoreCache(jnp.pad(keys, ((0, 0),) * 4 + ((0, room),)), end.cache)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return logits(model, last), DecodeState(kv, scores, lengths.astype(jnp.int32))


def decode_step(
    model: BaseModel,
    tokens: Int[Array, " B"],
    state: DecodeState,
    *,
    predictor: Predictor | None = None,
) -> tuple[Float[Array, "B V"], DecodeState, Float[Array, "L B H S"] | None]:
    """One token a row: logits after it, the caches with it, and its importance scores.

    The scores (None without a predictor) are those of every cached token, the new one included, for each query head,
    before any pooling; -inf where a row holds no token. Layer 0 is always dense: its scores mean nothing.
    Attention is dense. A row must have room: the caller keeps lengths below the capacity. Donate `state` under jit.
    """
    config, capacity = model.config, state.kv.capacity
    lengths = state.lengths
    rows = jnp.arange(tokens.shape[0])
    held = jnp.arange(capacity)[None] <= lengths[:, None]  # [B, S], the new token included
    positions = lengths[:, None]
    x = embed(model, tokens[:, None])
    context = None if predictor is None else predictor.context(positions, capacity)

    def trunk_attend(cache, q, k, v):
        k, v = (a.at[rows, lengths].set(new[:, 0].astype(a.dtype)) for a, new in zip(cache, (k, v), strict=True))
        out = _attend(q[:, 0], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), held)
        return out[:, None], (k, v)

    def mixer(carry, view: LayerView):
        walked, k, v, keys = carry
        k = k.at[view.index, rows, :, lengths].set(view.k[:, 0].astype(k.dtype))
        v = v.at[view.index, rows, :, lengths].set(view.v[:, 0].astype(v.dtype))
        found = None
        if predictor is not None:
            step = walk.step(predictor, walked, view, context, trunk_attend)
            fresh = predictor.keys(step.head, step.features, view, context)[:, 0]
            keys = keys.at[view.index, rows, :, :, lengths].set(fresh.astype(keys.dtype))
            query = predictor.queries(step.head, step.features, view, context)[:, 0]
            found = importance(query, keys[view.index], held)
            walked = step.state

        def attend(window):
            seen = held if window is None else held & (jnp.arange(capacity)[None] > positions - window)
            return _attend(view.q[:, 0], k[view.index], v[view.index], seen)[:, None]

        return by_window(config, view.index, attend), (walked, k, v, keys), found

    walked = keys = None
    if predictor is not None:
        walked, keys = walk.begin(predictor, x, context, state.scores.trunk), state.scores.keys
    start = (walked, state.kv.k, state.kv.v, keys)
    x, (walked, k, v, keys), found = run_layers(model, x, positions, mixer, start, length=capacity)
    scores = None if predictor is None else ScoreCache(keys, walked.cache)
    return logits(model, x[:, 0]), DecodeState(KVCache(k, v), scores, lengths + 1), found


def importance(query: Float[Array, "B H R"], keys: Float[Array, "B Q R S"], held: Any) -> Float[Array, "B H S"]:
    """query . key / sqrt(R) of every cached token, float32; -inf where `held` [B, S] is false."""
    batch, heads, rank = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, rank)
    scores = jnp.einsum("bqgr,bqrs->bqgs", grouped, keys, preferred_element_type=jnp.float32) * rank**-0.5
    return jnp.where(held[:, None], scores.reshape(batch, heads, -1), -jnp.inf)


def _attend(q: Float[Array, "B H D"], k: Float[Array, "B K S D"], v: Float[Array, "B K S D"], seen: Any):
    """Dense attention of one query a row over its cache, [B, H, D]."""
    batch, heads, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgs,bksd->bkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, dim).astype(q.dtype)


def _trunk_cache(predictor: Predictor, batch: int, capacity: int, dtype: Any) -> Any:
    """The trunk's cache, one for every producer; None where the trunk keeps none."""
    cache = predictor.trunk_cache(batch, capacity, dtype)
    return jax.tree.map(lambda a: jnp.broadcast_to(a[None], (predictor.producers, *a.shape)), cache)
