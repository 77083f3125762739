"""Decoding simulated in one pass: every query attends to its own choice only, in all layers but the first."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding import choosing_heads, layer_windows
from butler_jax.model import (
    BaseConfig,
    BaseModel,
    by_window,
    check_length,
    dense_mixer,
    document_starts,
    embed,
    exponentials,
    logits,
    merge_queries,
    run_layers,
    weighted_values,
)
from butler_jax.policies import Chunk, Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import Limits, SelectionConfig, beyond, limits_of, select_mask
from butler_jax.simulation.chunks import importance_walk, map_chunks
from butler_jax.simulation.eviction import evicting_attention

LOGIT_ROWS = 64  # rows of logits formed at a time


class Simulated(NamedTuple):
    """What a pass yields.

    nll: negative log-likelihood of the next token in nats, 0 where the next token is padding or of another
    document. greedy: the most likely next token. attended: per row the mean over KV heads (query heads where a policy
    chooses for each) and layers 1 ... of the fraction of its causal keys that was read. read: how many keys a row read
    in all layers and heads, layer 0 included. hidden: the last residual stream. With a reference, divergence: the
    Jensen-Shannon divergence in nats between both next-token distributions; agrees: 1 where both have the same greedy
    token.
    """

    nll: Float[Array, "B T"]
    greedy: Int[Array, "B T"]
    attended: Float[Array, "B T"]
    read: Float[Array, "B T"]
    hidden: Float[Array, "B T E"]
    divergence: Float[Array, "B T"] | None = None
    agrees: Float[Array, "B T"] | None = None


def simulate(
    model: BaseModel,
    batch: dict[str, Int[Array, "B T"]],
    policy: Policy,
    config: SelectionConfig,
    predictor: Predictor | None = None,
    *,
    wanted: Bool[Array, "B T"] | None = None,
    reference: Float[Array, "B T E"] | None = None,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> Simulated:
    """One pass over a batch (tokens, segments, positions) under a policy and a budget.

    wanted: the rows whose next token is asked for; the others may come out as 0, and the unembedding is not paid for
    where none is. reference: `hidden` of another pass over the batch, to compare predictions with. score_dtype: "int8"
    rounds the predictor's importance keys as decoding stores them (score_keys.py). Rows of padding come out finite and
    mean nothing.

    Raises ValueError beyond the model's context, where the policy needs a predictor and there is none, for thresholds
    of another model, and for an interval: every position chooses. Compiles once per policy and shape: the budget is
    data.
    """
    length = batch["tokens"].shape[1]
    check_length(model.config, length)
    if predictor is None and policy.needs_predictor:
        raise ValueError(f"the policy {policy.name} needs a trained predictor")
    if config.interval != 1:
        raise ValueError(
            f"the simulation chooses at every position, the interval is {config.interval}; only decoding has one"
        )
    batch = {name: jnp.asarray(batch[name]) for name in ("tokens", "segments", "positions")}
    config = policy.selection(config)
    limits = limits_of(config, model.config, length)
    if not policy.needs_predictor:
        predictor = None
    return _simulate(
        model, predictor, batch, limits, wanted, reference, policy=policy, rule=config.rule, score_dtype=score_dtype,
        implementation=implementation,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("policy", "rule", "score_dtype", "implementation"))
def _simulate(
    model, predictor, batch, limits, wanted, reference, *, policy, rule, score_dtype, implementation
) -> Simulated:
    x, fractions = hidden_states(
        model, predictor, batch, limits, policy=policy, rule=rule, score_dtype=score_dtype,
        implementation=implementation,
    )  # fmt: skip
    told = predictions(model, x, batch["tokens"], batch["segments"], wanted, reference)
    read = keys_read(model.config, batch["segments"], fractions, choosing_heads(policy, model.config))
    return Simulated(*told[:2], jnp.mean(fractions[1:], axis=0), read, x, *told[2:])


def keys_read(
    config: BaseConfig, segments: Int[Array, "B T"], fractions: Float[Array, "L B T"], heads: int
) -> Float[Array, "B T"]:
    """Keys that a row reads in all layers. heads: sets a layer chooses; layer 0 reads all keys of every KV head."""
    count = jnp.arange(segments.shape[1], dtype=jnp.int32)[None] - document_starts(segments) + 1
    windows = layer_windows(config)
    if windows is None:
        count = jnp.broadcast_to(count[None], fractions.shape)
    else:
        count = jnp.minimum(count[None], jnp.asarray(windows)[:, None, None])
    sets = jnp.where(jnp.arange(config.layers) > 0, heads, config.kv_heads).astype(jnp.float32)
    return jnp.einsum("l,lbt->bt", sets, fractions * count.astype(jnp.float32))


def hidden_states(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    limits: Limits,
    *,
    policy: Policy,
    rule: SelectionConfig,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "L B T"]]:
    """Last residual stream under a policy, and the fraction that a row read. rule: SelectionConfig.rule."""
    base, segments, positions = model.config, batch["segments"], batch["positions"]
    x = embed(model, batch["tokens"])
    if policy.name == "dense":
        x, _, _ = run_layers(model, x, positions, dense_mixer(base, segments, implementation), None)
        return x, jnp.ones((base.layers, *segments.shape), jnp.float32)
    length = segments.shape[1]
    begun, step = importance_walk(predictor, x, batch, implementation=implementation, score_dtype=score_dtype)

    def mixer(state, view):
        state, importance = step(state, view)

        def evict(limit):
            found = evicting_attention(view, segments, limit, policy, limits, rule)
            return found.output, found.fraction

        def attend(limit):
            apply = partial(sparse_chunk, policy=policy, limits=limits, rule=rule)
            (outputs, fractions), size = map_chunks(apply, view, importance, segments, limit)
            fractions = jnp.swapaxes(fractions, 0, 1).reshape(segments.shape[0], -1)[:, :length]
            return merge_queries(outputs, size, length), fractions

        output, fractions = by_window(base, view.index, evict if policy.evicts else attend)
        return output, state, fractions

    x, _, fractions = run_layers(model, x, positions, mixer, begun)
    return x, fractions


def sparse_chunk(chunk, values, number, *, policy: Policy, limits: Limits, rule: SelectionConfig):
    """Attention of a chunk over its chosen keys: output [B, K, M, D], fraction of causal keys read [B, C]."""
    mask, count = chosen_mask(chunk, policy(with_rule(chunk, rule)), limits, rule)
    batch, kv_heads, group, size, keys = chunk.logits.shape
    read = jnp.sum(mask, axis=(1, 3), dtype=jnp.int32)
    fraction = read.astype(jnp.float32) / (mask.shape[1] * jnp.maximum(count, 1)).astype(jnp.float32)
    mask = mask.reshape(batch, kv_heads, -1, size, keys)  # 1 or G sets in a group
    weights, total, _ = exponentials(chunk.logits, mask)
    output = weighted_values(weights.reshape(batch, kv_heads, group * size, keys), values)
    output = output / total.reshape(batch, kv_heads, group * size, 1)
    return output.astype(values.dtype), fraction


def with_rule(chunk: Chunk, rule: SelectionConfig) -> Chunk:
    """The chunk with the sinks and the recent of the selection that will choose."""
    return chunk._replace(sinks=rule.sinks, recent=rule.recent)


def chosen_mask(
    chunk: Chunk, scores: Float[Array, "B K C S"], limits: Limits, rule: SelectionConfig
) -> tuple[Bool[Array, "B K C S"], Int[Array, "B C"]]:
    """The keys that the chunk's rows read, and how many they may see. Layer 0 reads everything."""
    allowed = jnp.broadcast_to(chunk.allowed, (chunk.q.shape[0], *chunk.allowed.shape[1:]))[:, None]
    count = jnp.sum(allowed[:, 0], axis=-1, dtype=jnp.int32)
    tokens = jnp.where(chunk.layer > 0, limits.table[count], count)
    threshold = None
    if limits.threshold is not None:
        threshold = jnp.where(chunk.layer > 0, limits.threshold[chunk.layer], -jnp.inf)[None, :, None]
        threshold = beyond(limits.min_context, count[:, None], threshold)
    mask = select_mask(
        scores, allowed, chunk.rows, tokens, sinks=rule.sinks, recent=rule.recent, columns=chunk.columns,
        unit=rule.unit, threshold=threshold, neighbours=rule.neighbours,
    )  # fmt: skip
    return mask, count


def predictions(
    model: BaseModel,
    x: Float[Array, "B T E"],
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    wanted: Bool[Array, "B T"] | None = None,
    reference: Float[Array, "B T E"] | None = None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """nll, greedy, divergence and agrees of `Simulated`; a few rows of logits at a time, and none without a wanted row.

    What speaks of a next token is 0 where `has_next` is false.
    """
    batch, length = tokens.shape
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    chunks = -(-length // LOGIT_ROWS)
    pad = chunks * LOGIT_ROWS - length

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return jnp.swapaxes(a.reshape(batch, chunks, LOGIT_ROWS, *a.shape[2:]), 0, 1)

    def told(hidden, following, other):
        values = logits(model, hidden)
        greedy = jnp.argmax(values, axis=-1).astype(jnp.int32)
        logs = jax.nn.log_softmax(values)
        nll = -jnp.take_along_axis(logs, following[..., None], axis=-1)[..., 0]
        if other is None:
            return nll, greedy, None, None
        values = logits(model, other)
        same = (jnp.argmax(values, axis=-1) == greedy).astype(jnp.float32)
        return nll, greedy, jensen_shannon(logs, jax.nn.log_softmax(values)), same

    def one(rows):
        *rows, asked = rows
        if asked is None:
            return told(*rows)
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(told, *rows))
        return jax.lax.cond(jnp.any(asked), lambda: told(*rows), lambda: nothing)

    rows = (x, following, reference, wanted)
    parts = jax.lax.map(one, jax.tree.map(split, rows))
    nll, greedy, *compared = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(batch, -1)[:, :length], parts)
    after = has_next(segments)
    return jnp.where(after, nll, 0.0), greedy, *(a if a is None else jnp.where(after, a, 0.0) for a in compared)


def jensen_shannon(p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Jensen-Shannon divergence in nats (0 ... log 2) of distributions given by their logarithms."""
    middle = jnp.logaddexp(p, q) - jnp.log(2.0)
    parts = (jnp.sum(jnp.exp(a) * (a - middle), axis=-1) for a in (p, q))
    return jnp.maximum(0.5 * sum(parts), 0.0)


def has_next(segments: Int[Array, "B T"]) -> Array:
    """Which tokens are followed by a token of their own document: those whose next token is predicted."""
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return (segments > 0) & (segments == following)
