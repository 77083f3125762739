"""Prefill the caches from prompts: short ones in one dense pass, long ones chunk by chunk in bounded memory.

Under a policy that evicts, the prompt runs under the policy row by row, so that decoding goes on where a simulation of
the whole text would stand. A policy that cuts once keeps the whole prompt, and its first step cuts.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.decoding.cache import DecodeState, constrain_state, empty_store
from butler_jax.decoding.cached_attention import attend_cached
from butler_jax.decoding.choice import empty_memory
from butler_jax.decoding.eviction import Eviction, evict_rows, grown, nothing_kept
from butler_jax.decoding.newest_tokens import newest_of
from butler_jax.decoding.parts import write_chunk
from butler_jax.decoding.plan import Plan, make_plan
from butler_jax.decoding.score_cache import SCORE_LETTERS, ScoreCache, check_score_dtype, select_scored, store_scores
from butler_jax.decoding.scoring import empty_scores
from butler_jax.decoding.store import EvictingStore, KVStore
from butler_jax.model import (
    BaseConfig,
    BaseModel,
    LayerView,
    by_service,
    causal_attention,
    check_ids,
    check_tokens,
    dense_mixer,
    embed,
    logits,
    require_model,
    run_layers,
)
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor, walk
from butler_jax.selection import Rows, SelectionConfig, limits_of

CHUNK = 512  # tokens of a prompt that run together; shorter prompts run at once

Prefilled = tuple[Float[Array, "B E"], KVStore, ScoreCache | None]
"""The last residual stream of each row, and the caches."""


class Kept(NamedTuple):
    """Caches of the first tokens of a prompt, from which a prefill goes on.

    Attributes:
        kv: Keys and values, with room for any number of tokens.
        scores: What the predictor keeps of them; None without a predictor.
        tokens: How many tokens of each row they hold; those beyond mean nothing.
    """

    kv: KVStore
    scores: ScoreCache | None
    tokens: Int[Array, ""]


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
    attention: str | None = None,
    following: int = 0,
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Run prompts densely and keep what decoding needs of them.

    Args:
        tokens: Prompts, padded on the right to T.
        lengths: Tokens of each prompt, 1 ... T. Lengths that only the device knows are not checked: a length of 0
            leaves its row empty, its logits mean nothing, and its next step begins the row.
        predictor: Its caches are filled too.
        selection: Of the steps that follow. An interval takes room in the state, and a policy that evicts runs the
            prompts.
        policy: Of the steps that follow. Under one that evicts, prompts are not split into chunks and there is no
            predictor.
        chunk: Prompts of more tokens run in chunks of so many, as many as the longest row has. Padding beyond the
            longest row costs nothing.
        score_dtype: "int8" keeps k_imp in int8 (score_cache.py); None keeps it as the predictor makes it.
        attention: The implementation of `model.causal_attention`, for prompts that run at once.
        following: Tokens that follow each prompt at once. longrope counts them to the row's length.

    Returns:
        Logits after each row's last token in float32, and the state.

    Raises:
        ValueError: T exceeds the capacity, the capacity the model's context, or a length or a token is out of range.
    """
    require_model(model)
    check_ids(tokens, "B T")
    tokens = jnp.asarray(tokens)
    check_score_dtype(score_dtype)
    plan = make_plan(model.config, capacity, selection, policy, predictor=predictor)
    fixed = dict(capacity=capacity, chunk=chunk, score_dtype=score_dtype, following=following)
    return run_prompts(model, tokens, lengths, predictor, plan, attention=attention, **fixed)


def run_prompts(
    model: BaseModel,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    predictor: Predictor | None,
    plan: Plan,
    *,
    capacity: int,
    chunk: int,
    score_dtype: str | None,
    attention: str | None = None,
    following: int = 0,
    kept: Kept | None = None,
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Run prompts as `prefill` does, under a plan that is made. Kept tokens are not run again, where nothing evicts."""
    length = tokens.shape[1]
    check_sizes(model.config, tokens, lengths, capacity, chunk)
    lengths = jnp.asarray(lengths).astype(jnp.int32)
    whole = lengths + following
    if plan.when == "evicting":
        (last, kv, scores), memory = _prefill_evicting(model, tokens, lengths, whole, capacity, plan, attention)
        return logits(model, last), DecodeState(kv, scores, lengths, jnp.zeros((), jnp.int32), memory)
    if kept is None and length <= chunk:
        filled = _prefill_at_once(model, tokens, lengths, whole, capacity, predictor, attention)
    else:
        filled = _prefill_in_chunks(model, tokens, lengths, whole, capacity, predictor, chunk, kept)
    return finish(model, filled, lengths, plan, score_dtype)


def finish(
    model: BaseModel, filled: Prefilled, lengths: Int[Array, " B"], plan: Plan, score_dtype: str | None
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Logits and state, as `prefill` gives them, of prompts that were read."""
    last, kv, scores = filled
    if scores is not None:
        scores = store_scores(scores, lengths, score_dtype)
    memory, steps = empty_memory(plan, model.config.layers, len(lengths)), jnp.zeros((), jnp.int32)
    state = DecodeState(kv, scores, lengths, steps, memory, plan.span_means(kv, lengths))
    return logits(model, last), constrain_state(state)


def check_sizes(config: BaseConfig, tokens: Any, lengths: Any, capacity: int, chunk: int) -> None:
    """Raise ValueError for prompts that do not fit."""
    rows, length = tokens.shape
    if np.shape(lengths) != (rows,):
        raise ValueError(f"lengths must be one number for each of the {rows} rows of tokens, got {np.shape(lengths)}")
    if length > capacity:
        raise ValueError(f"prompts of {length} tokens do not fit a cache of {capacity}; raise the capacity")
    if capacity > config.context:
        raise ValueError(f"a cache of {capacity} tokens is beyond the model's context of {config.context}")
    if chunk < 1:
        raise ValueError(f"a chunk must have at least 1 token, got {chunk}")
    if isinstance(lengths, jax.core.Tracer):
        return
    known = np.asarray(lengths)
    if known.min() < 1:
        raise ValueError("a prompt has no tokens; give every row at least one")
    if known.max() > length:
        raise ValueError(f"a prompt of {known.max()} tokens does not fit the {length} columns of tokens")
    check_tokens(config, tokens, "B T", np.arange(length) < known[:, None], said="a prompt has")


def _prefill_at_once(model, tokens, lengths, whole, capacity, predictor, attention) -> Prefilled:
    """One dense pass over whole prompts; `whole` [B] as `length` in rope_angles."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    x = embed(model, tokens)
    dense = dense_mixer(model.config, None, attention)
    room = capacity - length

    def attend_trunk(_, q, k, v):
        cache = tuple(jnp.pad(a, ((0, 0), (0, room), (0, 0), (0, 0))) for a in (k, v))
        return causal_attention(q, k, v, implementation=attention), cache

    context = None if predictor is None else predictor.context(positions, whole)

    def mixer(walked, view: LayerView):
        walked, k_imp = _walk_layer(predictor, walked, view, context, attend_trunk)
        return dense(None, view)[0], walked, (*_by_heads(view.k, view.v), k_imp)

    walked = scores = None
    if predictor is not None:
        trunk = empty_scores(predictor, model, batch, capacity, x.dtype).trunk
        walked = walk.begin(predictor, x, context, trunk)
    x, walked, (k, v, k_imp) = run_layers(model, x, positions, mixer, walked, length=whole)
    k_imp = None if predictor is None else select_scored(model.config, k_imp)
    kv = empty_store(model.config, batch, capacity, x.dtype).append_chunk(k, v, 0)
    if predictor is not None:
        scores = ScoreCache(jnp.pad(k_imp, ((0, 0),) * 4 + ((0, room),)), walked.cache)
    return _last(x, lengths), kv, scores


def _prefill_in_chunks(model, tokens, lengths, whole, capacity, predictor, chunk, kept: Kept | None) -> Prefilled:
    """The same, a chunk of tokens at a time; the last chunk is moved back where it would reach beyond T."""
    (batch, length), begin = tokens.shape, 0
    filled = nothing_read(model, predictor, batch, capacity)
    if kept is not None:
        last, kv, scores = filled
        filled, begin = (last, _fit(kv, kept.kv), _fit(scores, kept.scores)), kept.tokens

    def one(number, filled):
        start = jnp.minimum(begin + number * chunk, length - chunk)
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        return read_chunk(model, predictor, part, start, lengths, whole, filled)

    return jax.lax.fori_loop(0, -(-(jnp.max(lengths) - begin) // chunk), one, filled)


def _fit(empty: Any, held: Any) -> Any:
    """Caches held for more or fewer tokens, with the room and the form of the empty ones."""

    def one(empty, held):
        return jax.lax.dynamic_update_slice(empty, held[tuple(map(slice, empty.shape))], (0,) * empty.ndim)

    return jax.tree.unflatten(jax.tree.structure(empty), map(one, jax.tree.leaves(empty), jax.tree.leaves(held)))


def nothing_read(model: BaseModel, predictor: Predictor | None, batch: int, capacity: int) -> Prefilled:
    """What a prefill in chunks begins with."""
    dtype = stream_dtype(model)
    scores = None if predictor is None else empty_scores(predictor, model, batch, capacity, dtype)
    return jnp.zeros((batch, model.config.width), dtype), empty_store(model.config, batch, capacity, dtype), scores


def stream_dtype(model: BaseModel) -> jnp.dtype:
    """The precision of the residual stream, and of keys and values."""
    return jax.eval_shape(embed, model, jnp.zeros((1, 1), jnp.int32)).dtype


def read_chunk(
    model: BaseModel,
    predictor: Predictor | None,
    tokens: Int[Array, "B C"],
    start: Int[Array, ""],
    lengths: Int[Array, " B"],
    whole: Int[Array, " B"],
    filled: Prefilled,
) -> Prefilled:
    """Read the tokens start ... start + C - 1 of prompts whose earlier ones are cached.

    lengths: of the prompts. Tokens beyond them are read too and mean nothing. whole: as `length` in rope_angles.
    """
    config, (batch, chunk), (last, kv, scores) = model.config, tokens.shape, filled
    newest = newest_of(config, jnp.broadcast_to(start, (batch,)))
    positions = start + jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32)[None], (batch, chunk))
    x = embed(model, tokens)
    context = None if predictor is None else predictor.context(positions, whole)

    def attend_trunk(cache, q, k, v):
        old = (a.transpose(0, 2, 1, 3)[None] for a in cache)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        new = tuple(write(a, b.astype(a.dtype)) for a, b in zip(cache, (k, v), strict=True))
        return attend_cached(q, k, v, *old, 0, newest.cached), new

    def mixer(walked, view: LayerView):
        walked, k_imp = _walk_layer(predictor, walked, view, context, attend_trunk)
        return kv.attend_all(view, newest), walked, (*_by_heads(view.k, view.v), k_imp)

    walked = None if predictor is None else walk.begin(predictor, x, context, scores.trunk)
    x, walked, (k, v, k_imp) = run_layers(model, x, positions, mixer, walked, length=whole)
    kv = kv.append_chunk(k, v, start)
    if predictor is not None:
        k_imp = select_scored(config, k_imp)
        scores = ScoreCache(write_chunk(scores.k_imp, k_imp, start, SCORE_LETTERS), walked.cache)
    at = lengths - 1 - start
    found = _last(x, jnp.clip(at, 0, chunk - 1) + 1)
    return jnp.where(((at >= 0) & (at < chunk))[:, None], found, last), kv, scores


def _prefill_evicting(model, tokens, lengths, whole, capacity, plan: Plan, attention) -> tuple[Prefilled, Eviction]:
    """Prompts under a policy that evicts, and what every layer has kept.

    Rows end together: a shorter one begins later, after rows that mean nothing, and keeps nothing of them. Keys and
    values that were dropped stay in the store unread.
    """
    config, (batch, length), policy = model.config, tokens.shape, plan.policy
    limits = limits_of(plan.selection, config, capacity, plan.heads)
    table = jnp.arange(len(limits.table), dtype=jnp.int32) if policy.once else limits.table
    columns = jnp.arange(length, dtype=jnp.int32)[None]
    shift = (length - lengths)[:, None]
    rows = Rows(columns - shift, jnp.zeros((batch, length), jnp.int32))
    dense = dense_mixer(config, None, attention)

    def move(x, place):
        return jnp.take_along_axis(x, jnp.clip(place, 0, length - 1)[:, :, None, None], axis=1)

    def mixer(carry, view: LayerView):
        def sparse(sliding_window):
            q, rule = move(view.q, rows.own), plan.selection.rule
            budgets = table[rows.seen(sliding_window)]
            how = view.attention_terms
            found = evict_rows(policy, q, view.k, view.v, rows, budgets[None], sliding_window, rule, **how)
            return move(found.output, columns + shift), grown(policy, found.state, capacity)

        def everything():
            out = dense(None, view)[0].astype(view.v.dtype)
            return out, nothing_kept(policy, (batch, config.kv_heads, capacity))

        def serve(sliding_window):
            return jax.lax.cond(view.index > 0, lambda: sparse(sliding_window), everything)

        out, memory = by_service(config, view.index, serve, everything)
        return out, carry, (*_by_heads(view.k, view.v), memory)

    positions = jnp.broadcast_to(columns, tokens.shape)
    x, _, (k, v, memory) = run_layers(model, embed(model, tokens), positions, mixer, None, length=whole)
    kv = empty_store(config, batch, capacity, x.dtype).append_chunk(k, v, 0)
    return (_last(x, lengths), EvictingStore(kv.k, kv.v), None), memory


def _walk_layer(predictor: Predictor | None, walked: Any, view: LayerView, context: Any, attend: Any):
    """The predictor's walk after a layer, and the layer's k_imp [B, Q, R, T]."""
    if predictor is None:
        return None, None
    step = walk.advance(predictor, walked, view, context, attend)
    return step.state, predictor.k_imp(step.head, step.features, view, context).transpose(0, 2, 3, 1)


def _by_heads(*arrays: Float[Array, "B T K D"]) -> tuple[Float[Array, "B K T D"], ...]:
    """Rows of tokens as a store keeps them."""
    return tuple(a.transpose(0, 2, 1, 3) for a in arrays)


def _last(x: Float[Array, "B T E"], lengths: Int[Array, " B"]) -> Float[Array, "B E"]:
    """The residual stream of each row's last token."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
