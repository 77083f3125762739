"""One token a row: score the cached tokens, choose a few, attend to those, in every layer but the first.

The caches are only read while the layers run; the new token's rows are written once, after them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding import score_cache
from butler_jax.decoding.cache import DecodeState, KVCache, ScoreCache, split_state, write_token
from butler_jax.decoding.cached_attention import cached_attention
from butler_jax.decoding.evicting import evicting_step
from butler_jax.decoding.offload import Fetched, fetch_layer, fetch_units, write_token_on_host
from butler_jax.decoding.parts import check_units, part_of, with_new
from butler_jax.decoding.scoring import chunk_of, issue, with_own
from butler_jax.model import BaseModel, LayerView, embed, layer_windows, logits, run_layers
from butler_jax.parallel import by_rows_and_heads, token_axis
from butler_jax.policies import Evicting, Policy, TokenButler
from butler_jax.predictors import Predictor, at, walk
from butler_jax.selection import (
    Chosen,
    SelectionConfig,
    attended_tokens,
    beyond,
    choose,
    chosen_tokens,
    kept,
    limits_of,
    recent_from,
    room_for,
    with_recent,
)
from pallas_kernels import importance_scores, importance_totals, masked_topk_decode_attention


class Found(NamedTuple):
    """What a step looked at.

    attended: tokens really read by every layer and KV head (query head where a policy chooses for each), the row's own
    included. With details: chosen, the set itself (None where decoding is dense), and scores, the predictor's per query
    head, -inf where a row holds no token (None without a predictor). Layer 0 is dense: its scores mean nothing.
    """

    attended: Int[Array, "L B K"]
    chosen: Bool[Array, "L B K S"] | None = None
    scores: Float[Array, "L B H S"] | None = None


def decode_step(
    model: BaseModel,
    tokens: Int[Array, " B"],
    state: DecodeState,
    *,
    predictor: Predictor | None = None,
    selection: SelectionConfig | None = None,
    policy: Policy | None = None,
    most: int | None = None,
    implementation: str | None = None,
    details: bool = False,
) -> tuple[Float[Array, "B V"], DecodeState, Found]:
    """One token a row: logits after it, float32, the state with it, and what was read.

    selection: which cached tokens are attended (None: all; the predictor's caches are kept all the same). policy: who
    scores them; None is the predictor, as `TokenButler()`; one that evicts goes on from a prefill under it, without the
    predictor (evicting_decode.py). most: the largest budget of any row at this step, in tokens, where the caller knows
    that it is below the largest of the cache's length. implementation: of pallas_kernels.
    details: see Found. Donate `state` under jit; all that is not an array is static there.

    Raises ValueError where the cache is known to be full, where the policy needs a predictor and there is none, where
    thresholds are another model's, and where an interval or a policy that evicts is asked of a state that `prefill` did
    not make for it.
    """
    policy = policy or TokenButler()
    selection = None if selection is None else policy.selection(selection)
    evicts = selection is not None and isinstance(policy, Evicting)
    check_step(state, None if evicts else predictor, selection, policy)
    if evicts:
        out, state, *found = evicting_step(model, tokens, state, selection, policy, most=most, details=details)
        return out, state, Found(*found)
    config, capacity, batch = model.config, state.kv.capacity, tokens.shape[0]
    axis = token_axis(capacity)
    cached, total = state.lengths, state.lengths + 1
    x = embed(model, tokens[:, None])
    context = None if predictor is None else predictor.context(cached[:, None], capacity)
    windows = layer_windows(config)
    ahead_known = (
        selection is not None and policy.predictor_pooling is not None
    )  # it looks at nothing but the predictor
    raw = predictor is not None and (details or (selection is not None and policy.needs_predictor and not ahead_known))
    prefetched = ahead_known and state.kv.near is not None
    if selection is not None:
        limits = limits_of(selection, config, capacity)
        check_units(capacity, selection.unit)
        room = room_for(selection, capacity, most)
        sets = policy.choosing_heads(config)
        if selection.interval > 1:
            check_room(state, sets, room)
        now = state.steps % selection.interval == 0

    def window_of(layer):
        return None if windows is None else jnp.asarray(windows)[layer]

    def first_of(layer):
        return None if windows is None else jnp.maximum(total - window_of(layer), 0)

    def score(queries, layer):
        seen = 0 if windows is None else total - window_of(layer)
        first = jnp.maximum(seen, selection.sinks) + jnp.zeros_like(total)
        contested = jnp.maximum(total - selection.recent, 0)  # sinks and recent tokens are read whatever their score
        scales = None if state.scores.scales is None else state.scores.scales[layer]

        def run(queries, keys, contested, first, layer, scales):
            part = part_of(keys.shape[-1], axis)
            options = dict(scales=scales, layer=layer, implementation=implementation)
            if part is not None:
                contested, first = part.count(contested), part.count(first)
                if policy.predictor_pooling == "normalised":
                    totals = part.log_sum(importance_totals(queries, keys, contested, first=first, **options))
                    options["totals"] = totals
            return importance_scores(queries, keys, contested, first=first, pooling=policy.predictor_pooling, **options)

        operands = ("bh--", "-bh-s", "b", "b", "", "bh")
        split = by_rows_and_heads(run, operands, "bhs", rows=batch, heads=config.kv_heads, tokens=capacity)
        return split(queries, state.scores.k_imp, contested, first, layer, scales)

    def pick(values, lengths, first, threshold):
        count = lengths if first is None else lengths - first

        def run(values, lengths, tokens, first, threshold):
            options = dict(first=first, threshold=threshold, implementation=implementation)
            return choose(values, lengths, tokens, room, selection, **options)

        threshold = beyond(limits.min_context, count[:, None], threshold)
        if threshold is not None:
            threshold = jnp.broadcast_to(threshold, values.shape[:2])
        split = by_rows_and_heads(
            run, ("bw-", "b", "b", "b", "bw"), Chosen("bw-", "bw-"), rows=batch, heads=config.kv_heads
        )
        return split(values, lengths, limits.table[count], first, threshold)

    def pick_block(values, layers):
        block = values.shape[1]
        first = threshold = None
        if windows is not None:
            first = jnp.maximum(total[:, None] - window_of(layers)[None], 0).reshape(-1)
        if limits.threshold is not None:
            threshold = jnp.tile(limits.threshold[layers], (batch, 1))
        values = values.reshape(batch * block, *values.shape[2:])
        chosen = pick(values, jnp.repeat(total, block), first, threshold)
        return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(batch, block, *a.shape[1:]), 0, 1), chosen)

    def issue_block(features, index):
        kernels = dict(score=score, choose=pick_block) if ahead_known else dict(score=None, choose=None)
        return issue(predictor, model, features, context, index, state.scores, raw=raw, **kernels)

    def units(layer, chosen):
        """The units that a layer attends, and what it keeps of them; chosen: gives its choice, were it made now."""
        if selection.interval == 1:
            return chosen(), None
        keep = jax.lax.cond(now, lambda: kept(chosen(), total, selection), lambda: at(state.chosen, layer))
        low = recent_from(limits, selection, total, state.steps, window_of(layer))
        return with_recent(keep, low, total, selection, capacity), keep

    def fetch(layer, chosen):
        return fetch_units(state.kv, layer, chosen, selection.unit, cached, first_of(layer))

    def fetch_next(index, ahead):
        """The rows of the layer after `index`: known unless a new block chooses there."""
        layer = jnp.minimum(index + 1, config.layers - 1)
        place = jnp.minimum((index - 1) % predictor.stride + 1, predictor.stride - 1)
        return fetch(layer, units(layer, lambda: at(ahead.chosen, place))[0])

    def mixer(carry, view: LayerView):
        walked, ahead, rows = carry
        sliding_window, first = window_of(view.index), first_of(view.index)
        key = scores = None
        if predictor is not None:
            step = walk.step(predictor, walked, view, context, partial(_trunk_attend, cached))
            key = predictor.k_imp(step.head, step.features, view, context)[:, 0]
            walked = step.state
        if ahead is not None:
            wanted = step.place.starts if details else step.place.starts & now
            ahead = jax.lax.cond(wanted, lambda: issue_block(step.features, view.index), lambda: ahead)
            place = (view.index - 1) % predictor.stride
            scores = with_own(ahead.scores[place], ahead.queries[place], key, cached) if raw else None

        def everything():
            kv, layer = _whole_layer(state.kv, view.index, selection is not None)
            out = cached_attention(view.q, view.k, view.v, kv.k, kv.v, layer, cached, sliding_window)
            count = total if first is None else total - first
            return out, jnp.broadcast_to(count[:, None], (count.shape[0], sets if selection else config.kv_heads))

        def fresh() -> Chosen:
            if ahead_known:
                return at(ahead.chosen, place)
            kv, layer = _whole_layer(state.kv, view.index, False)
            keys, values = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (kv.k, kv.v))
            chunk = chunk_of(view, keys, values, cached, first, scores)
            values = policy(chunk._replace(sinks=selection.sinks, recent=selection.recent))[:, :, 0]
            return pick(values, total, first, None if limits.threshold is None else limits.threshold[view.index][None])

        def sparse():
            chosen, keep = units(view.index, fresh)
            own = None
            if prefetched:
                own = jax.lax.cond(step.place.starts & now, lambda: fetch(view.index, chosen), lambda: rows)
            out = _attend_chosen(view, state.kv, chosen, own, cached, first, selection.unit, implementation)
            mask = chosen_tokens(chosen, total, first, selection.unit, capacity) if details else None
            return (out, attended_tokens(chosen, total, first, selection.unit)), keep, mask

        def dense():
            mask = None
            if details:
                columns = jnp.arange(capacity, dtype=jnp.int32)[None, None]
                mask = jnp.broadcast_to(columns < total[:, None, None], (total.shape[0], sets, capacity))
                mask = mask if first is None else mask & (columns >= first[:, None, None])
            return everything(), None if selection.interval == 1 else at(state.chosen, view.index), mask

        if selection is None:
            (out, count), keep, mask = everything(), None, None
        else:
            (out, count), keep, mask = jax.lax.cond(view.index > 0, sparse, dense)
        rows = fetch_next(view.index, ahead) if prefetched else None
        shown = None
        if details and raw:
            held = jnp.arange(capacity, dtype=jnp.int32)[None] < total[:, None]
            shown = jnp.where(held[:, None], scores.reshape(scores.shape[0], -1, capacity), -jnp.inf)
        return out, (walked, ahead, rows), (view.k[:, 0], view.v[:, 0], key, keep, Found(count, mask, shown))

    walked = ahead = rows = None
    if predictor is not None:
        walked = walk.begin(predictor, x, context, state.scores.trunk)
    if ahead_known or raw:
        features = walked.captured if walked.features is None else walked.features
        ahead = _zeros(lambda: issue_block(features, jnp.asarray(1)))
    if prefetched:
        rows = _zeros(lambda: fetch_next(jnp.asarray(0), ahead))
    x, (walked, *_), (k, v, keys, keep, found) = run_layers(
        model, x, cached[:, None], mixer, (walked, ahead, rows), length=capacity
    )
    if state.kv.near is None:
        kv = KVCache(*(write_token(a, b, cached) for a, b in ((state.kv.k, k), (state.kv.v, v))))
    else:
        kv = write_token_on_host(state.kv, k, v, cached)
    scores = None
    if predictor is not None:
        scores = ScoreCache(score_cache.write(state.scores, keys, cached), walked.cache, state.scores.scales)
    keep = state.chosen if keep is None else keep
    new = DecodeState(kv, scores, total, state.steps + 1, keep)
    return logits(model, x[:, 0]), new if kv.near is not None else split_state(new), found


def check_step(
    state: DecodeState, predictor: Predictor | None, selection: SelectionConfig | None, policy: Policy
) -> None:
    """Raise ValueError where a step cannot be done; what is only known on the device is not looked at."""
    if not isinstance(state.lengths, jax.core.Tracer):
        most, capacity = int(np.max(np.asarray(state.lengths))), state.kv.capacity
        if not most < capacity:
            raise ValueError(
                f"the cache is full: a row holds {most} of {capacity} tokens; prefill with a larger capacity"
            )
    if not (state.evicted is None or (selection is not None and isinstance(policy, Evicting))):
        raise ValueError(
            "the state was prefilled under a policy that evicts; decode with the same selection and policy"
        )
    if predictor is not None and state.scores is None:
        raise ValueError("the state has no importance keys: prefill was done without the predictor; give it there too")
    if selection is None:
        return
    if predictor is None and policy.needs_predictor:
        raise ValueError(
            f"the policy {policy.name} needs a trained predictor; give predictor=, or selection=None to decode densely"
        )
    if selection.interval != 1 and state.chosen is None:
        raise ValueError(
            f"an interval of {selection.interval} keeps a choice over the steps, and the state has no room for one; "
            "give the selection to prefill too"
        )


def check_room(state: DecodeState, sets: int, room: int) -> None:
    """Raise ValueError where the room that prefill made for a choice is another selection's."""
    found = state.chosen.indices.shape[2:]
    if found != (sets, room):
        raise ValueError(
            f"the state has room for {found[1]} units of {found[0]} heads, and this selection chooses {room} of "
            f"{sets}: prefill was done for another one; give both the same"
        )


def _trunk_attend(cached, cache, q, k, v):
    """A trunk's attention of one token a row, and its cache with it."""
    rows = jnp.arange(cached.shape[0])
    new = tuple(a.at[rows, cached].set(b[:, 0].astype(a.dtype)) for a, b in zip(cache, (k, v), strict=True))
    return cached_attention(q, k, v, *(a.transpose(0, 2, 1, 3)[None] for a in cache), 0, cached), new


def _whole_layer(kv: KVCache, index: Int[Array, ""], only_first: bool) -> tuple[KVCache, Int[Array, ""] | int]:
    """Caches on the device that hold a layer, and its place in them. only_first: it is known to be layer 0."""
    if kv.near is None:
        return kv, index
    if only_first:
        return kv.near, 0
    return jax.lax.cond(index > 0, lambda: fetch_layer(kv, index), lambda: kv.near), 0


def _attend_chosen(
    view: LayerView,
    kv: KVCache,
    chosen: Chosen,
    fetched: Fetched | None,
    cached: Int[Array, " B"],
    first: Int[Array, " B"] | None,
    unit: int,
    implementation: str | None,
) -> Float[Array, "B 1 H D"]:
    """Attention of one token a row over the chosen units of its layer, and itself. fetched: their rows, if here yet."""
    batch, _, heads, dim = view.q.shape
    kv_heads = view.k.shape[2]

    def attend(q, k, v, new_k, new_v, chosen, lengths, first, layer, unit):
        tokens = k.shape[-2]
        axis = token_axis(tokens)

        def run(q, k, v, new_k, new_v, indices, valid, lengths, first, layer):
            part = part_of(k.shape[-2], axis)
            options = dict(unit=unit, layer=layer, implementation=implementation)
            if part is None:
                options.update(new_k=new_k, new_v=new_v, lengths=lengths, first=first)
                return masked_topk_decode_attention(q, k, v, indices, valid, **options)
            own = part.own(Chosen(indices, valid), unit)
            options.update(lengths=part.count(lengths), first=None if first is None else part.count(first))
            out, residual = masked_topk_decode_attention(q, k, v, *own, return_residual=True, **options)
            return with_new(q, new_k, new_v, *part.merged(residual[..., None], 1.0, out.astype(jnp.float32)))

        cache = "bhs-" if layer is None else "-bhs-"
        operands = ("bh-", cache, cache, "bh-", "bh-", "bh-", "bh-", "b", "b", "")
        split = by_rows_and_heads(run, operands, "bh-", rows=batch, heads=kv_heads, tokens=tokens)
        return split(q, k, v, new_k, new_v, *chosen, lengths, first, layer)

    def one(q, chosen, rows):
        new = view.k[:, 0], view.v[:, 0]
        if kv.near is None:
            return attend(q, kv.k, kv.v, *new, chosen, cached, first, view.index, unit)
        rows = fetch_units(kv, view.index, chosen, unit, cached, first) if rows is None else rows
        place = jnp.broadcast_to(jnp.arange(rows.held.shape[-1], dtype=jnp.int32)[None, None], rows.held.shape)
        return attend(q, rows.k, rows.v, *new, (place, rows.held), None, None, None, 1)

    group = chosen.indices.shape[1] // kv_heads
    if group == 1:
        return one(view.q[:, 0], chosen, fetched)[:, None]
    # A set for every query head: one head of each group at a time, so that nothing of the cache is repeated.
    queries = view.q.reshape(batch, kv_heads, group, dim)
    apart = jax.tree.map(lambda a: a.reshape(batch, kv_heads, group, -1), chosen)
    parts = [one(queries[:, :, g], jax.tree.map(lambda a, g=g: a[:, :, g], apart), None) for g in range(group)]
    return jnp.stack(parts, axis=2).reshape(batch, 1, heads, dim)


def _zeros(function: Callable[[], Any]) -> Any:
    """Zeros in the shapes of what a function would return."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function))
