"""Fill the caches from prompts: short ones in one dense pass, long ones chunk by chunk in bounded memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.decoding.cache import DecodeState, KVCache, ScoreCache, empty_chosen, empty_kv_cache, split_state
from butler_jax.decoding.cached_attention import cached_attention
from butler_jax.decoding.evicting import fill_evicting
from butler_jax.decoding.parts import write_chunk
from butler_jax.decoding.score_cache import check_score_dtype, store
from butler_jax.decoding.scoring import empty_scores
from butler_jax.model import (
    BaseModel,
    LayerView,
    causal_attention,
    dense_mixer,
    embed,
    layer_windows,
    logits,
    run_layers,
)
from butler_jax.policies import Evicting, Policy, TokenButler
from butler_jax.predictors import Predictor, walk
from butler_jax.selection import SelectionConfig, room_for

CHUNK = 512  # tokens of a prompt that run together; shorter prompts run at once


def prefill(
    model: BaseModel,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    capacity: int,
    predictor: Predictor | None = None,
    selection: SelectionConfig | None = None,
    policy: Policy | None = None,
    chunk: int = CHUNK,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Run prompts densely; logits after each row's last token, and the caches of `capacity` tokens a row.

    tokens: prompts, padded on the right to T. lengths: tokens of each prompt, 1 ... T. selection, policy: those of the
    steps that follow; an interval needs them, for the room it takes, and a policy that evicts, under which the prompts
    run then, whole and without the predictor (evicting_decode.py). chunk: prompts of more tokens run in chunks
    of so many, as many of them as the longest row has: T may be the padding of any shorter prompt and is not paid for.
    score_dtype: "int8" keeps the importance keys in int8 (score_cache.py); None as the predictor makes them.
    implementation: of attention.causal_attention, for prompts that run at once. Lengths that only the device knows are
    not looked at: one of 0 leaves its row empty, its logits mean nothing, and its next step begins it.

    Raises ValueError where T exceeds the capacity or the capacity the model's context, or a length is out of range.
    """
    batch, length = tokens.shape
    if not length <= capacity:
        raise ValueError(f"prompts of {length} tokens do not fit a cache of {capacity}; raise the capacity")
    if not capacity <= model.config.context:
        raise ValueError(f"a cache of {capacity} tokens is beyond the model's context of {model.config.context}")
    check_score_dtype(score_dtype)
    if not chunk >= 1:
        raise ValueError(f"a chunk must have at least 1 token, got {chunk}")
    if not isinstance(lengths, jax.core.Tracer):
        known = np.asarray(lengths)
        least, most = int(known.min()), int(known.max())
        if not least >= 1:
            raise ValueError("a prompt has no tokens; give every row at least one")
        if not most <= length:
            raise ValueError(f"a prompt of {most} tokens does not fit the {length} columns of tokens")
    lengths = jnp.asarray(lengths).astype(jnp.int32)
    if selection is not None and isinstance(policy, Evicting):
        last, kv, evicted = fill_evicting(model, tokens, lengths, capacity, selection, policy, implementation)
        return logits(model, last), DecodeState(kv, None, lengths, jnp.zeros((), jnp.int32), evicted=evicted)
    run = _at_once if length <= chunk else partial(_in_chunks, chunk=chunk)
    last, kv, scores = run(model, tokens, lengths, capacity, predictor, implementation)
    if scores is not None:
        scores = store(scores, lengths, score_dtype)
    chosen, policy = None, policy or TokenButler()
    selection = None if selection is None else policy.selection(selection)
    if selection is not None and selection.interval > 1:
        heads = policy.choosing_heads(model.config)
        chosen = empty_chosen(model.config, batch, heads, room_for(selection, capacity))
    state = DecodeState(kv, scores, lengths, jnp.zeros((), jnp.int32), chosen)
    return logits(model, last), split_state(state)


def _at_once(model, tokens, lengths, capacity, predictor, implementation):
    """Last residual stream of each row [B, E] and the filled caches."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    x = embed(model, tokens)
    dense = dense_mixer(model.config, None, implementation)
    room = capacity - length

    def trunk_attend(_, q, k, v):
        cache = tuple(jnp.pad(a, ((0, 0), (0, room), (0, 0), (0, 0))) for a in (k, v))
        return causal_attention(q, k, v, implementation=implementation), cache

    context = None if predictor is None else predictor.context(positions, capacity)

    def mixer(state, view: LayerView):
        state, keys = _keys(predictor, state, view, context, trunk_attend)
        rows = tuple(a.transpose(0, 2, 1, 3) for a in (view.k, view.v))
        return dense(None, view)[0], state, (*rows, keys)

    start = scores = None
    if predictor is not None:
        trunk = empty_scores(predictor, model, batch, capacity, x.dtype).trunk
        start = walk.begin(predictor, x, context, trunk)
    x, end, (k, v, keys) = run_layers(model, x, positions, mixer, start, length=capacity)
    kv = empty_kv_cache(model.config, batch, capacity, x.dtype)
    kv = KVCache(*(write_chunk(a, b, 0, "-bhs-") for a, b in ((kv.k, k), (kv.v, v))))
    if predictor is not None:
        scores = ScoreCache(jnp.pad(keys, ((0, 0),) * 4 + ((0, room),)), end.cache)
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0], kv, scores


def _in_chunks(model, tokens, lengths, capacity, predictor, implementation, *, chunk):
    """The same, a chunk of tokens at a time; the last chunk is moved back where it would reach beyond T."""
    config, (batch, length) = model.config, tokens.shape
    windows = layer_windows(config)
    kv = empty_kv_cache(config, batch, capacity, model.embedding[...].dtype)
    scores = None if predictor is None else empty_scores(predictor, model, batch, capacity, kv.k.dtype)

    def one(number, carry):
        last, kv, scores = carry
        start = jnp.minimum(number * chunk, length - chunk)
        cached = jnp.broadcast_to(start, (batch,))
        positions = start + jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32)[None], (batch, chunk))
        x = embed(model, jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1))
        context = None if predictor is None else predictor.context(positions, capacity)

        def trunk_attend(cache, q, k, v):
            old = (a.transpose(0, 2, 1, 3)[None] for a in cache)
            new = tuple(
                jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), start, axis=1)
                for a, b in zip(cache, (k, v), strict=True)
            )
            return cached_attention(q, k, v, *old, 0, cached), new

        def mixer(state, view: LayerView):
            state, keys = _keys(predictor, state, view, context, trunk_attend)
            sliding_window = None if windows is None else jnp.asarray(windows)[view.index]
            out = cached_attention(view.q, view.k, view.v, kv.k, kv.v, view.index, cached, sliding_window)
            return out, state, (*(a.transpose(0, 2, 1, 3) for a in (view.k, view.v)), keys)

        begun = None if predictor is None else walk.begin(predictor, x, context, scores.trunk)
        x, end, (k, v, keys) = run_layers(model, x, positions, mixer, begun, length=capacity)
        kv = KVCache(*(write_chunk(a, b, start, "-bhs-") for a, b in ((kv.k, k), (kv.v, v))))
        if predictor is not None:
            scores = ScoreCache(write_chunk(scores.k_imp, keys, start, "-bh-s"), end.cache)
        at = lengths - 1 - start
        found = jnp.take_along_axis(x, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((at >= 0) & (at < chunk))[:, None], found, last), kv, scores

    last = jnp.zeros((batch, config.width), kv.k.dtype)
    return jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), one, (last, kv, scores))


def _keys(predictor: Predictor | None, state: Any, view: LayerView, context: Any, attend: Any):
    """The predictor's state after a layer, and the layer's importance keys [B, Q, R, T]."""
    if predictor is None:
        return None, None
    step = walk.step(predictor, state, view, context, attend)
    return step.state, predictor.k_imp(step.head, step.features, view, context).transpose(0, 2, 3, 1)
