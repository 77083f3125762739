"""Attention beside the predictor's scores, and the tokens that a row reads under a policy and a budget."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from butler_jax.data import Batch, as_batch
from butler_jax.evaluation.analysis.agreement import check_policy, choose_selection
from butler_jax.evaluation.analysis.rows import row_chunk, softmax
from butler_jax.model import (
    BaseModel,
    by_sliding_window,
    check_length,
    dense_mixer,
    embed,
    grouped_sinks,
    run_layers,
    sink_logits,
)
from butler_jax.policies import Policy, TokenButler
from butler_jax.predictors import Predictor
from butler_jax.selection import Limits, SelectionConfig, limits_of
from butler_jax.simulation import chosen_mask, importance_walk, map_chunks, merge_rows, sparse_chunk

LONGEST = 2048  # tokens of a text whose T x T weights are drawn


class Scored(NamedTuple):
    """One query head of one layer on a text of T tokens without padding: rows are queries, columns are keys.

    Attributes:
        attention: The true weights.
        predicted: The softmax of the predictor's scores over the causal keys.
        logits: What `attention` is the softmax of; NaN for keys that a query may not see.
        scores: What `predicted` is the softmax of; NaN likewise.
    """

    attention: Float[np.ndarray, "T T"]
    predicted: Float[np.ndarray, "T T"]
    logits: Float[np.ndarray, "T T"]
    scores: Float[np.ndarray, "T T"]


class Reading(NamedTuple):
    """What one row reads.

    Attributes:
        sets: sets[l, k, j] says whether KV head k of layer l reads token j; K is H for a policy that chooses per query
            head.
        position: The row's column.
        policy: The name of the policy.
        selection: Its selection.
        served: The layers in which it chooses; None for all but layer 0.
    """

    sets: Bool[np.ndarray, "L K T"]
    position: int
    policy: str
    selection: SelectionConfig
    served: tuple[int, ...] | None = None

    @property
    def chosen(self) -> Bool[np.ndarray, "layers K T"]:
        """The sets of the served layers."""
        return self.sets[1:] if self.served is None else self.sets[list(self.served)]

    @property
    def counts(self) -> Int[np.ndarray, " T"]:
        """How many of the sets of the served layers hold each token."""
        return self.chosen.sum(axis=(0, 1))

    @property
    def by_layer(self) -> Int[np.ndarray, "L T"]:
        """How many KV heads of each layer read each token."""
        return self.sets.sum(axis=1)

    @property
    def most(self) -> int:
        """The largest possible count: the number of sets in the served layers."""
        return self.chosen[:, :, 0].size


def compare_attention(model: BaseModel, predictor: Predictor, batch: Batch, *, layer: int, head: int) -> Scored:
    """Compute the true attention of a query head beside the predictor's scores, from a dense pass.

    Args:
        batch: tokens, segments, positions [1, T], of at most LONGEST tokens: the result is T x T.
        layer: A served one; others have no scores.

    Raises:
        ValueError: The batch has more than one row or is too long, the layer or the head does not exist, or there is no
            predictor.
    """
    base, length = model.config, _one_row(model, batch)
    TokenButler().require_predictor(predictor)
    if length > LONGEST:
        raise ValueError(f"the text has {length} tokens and the picture is T x T; give at most {LONGEST} tokens")
    if not (1 <= layer < base.layers):
        raise ValueError(f"layer must be 1 ... {base.layers - 1} (layer 0 has no scores), got {layer}")
    if not base.served[layer]:
        raise ValueError(
            f"layer {layer} slides and is not served, so it has no scores; take one of {base.served_layers}"
        )
    if not (0 <= head < base.heads):
        raise ValueError(f"head must be 0 ... {base.heads - 1}, got {head}")
    found = _compare_attention(model, predictor, as_batch(batch), jnp.int32(layer), jnp.int32(head))
    real = np.flatnonzero(batch["segments"][0] > 0)[-1] + 1
    return Scored(*(np.asarray(a)[:real, :real] for a in found))


def find_reading(
    model: BaseModel,
    predictor: Predictor | None,
    batch: Batch,
    policy: Policy,
    selection: SelectionConfig | None = None,
    *,
    position: int = -1,
) -> Reading:
    """Find the sets that one row of a text reads when all rows before it read sparsely too, as in `simulate`.

    Args:
        batch: tokens, segments, positions [1, T].
        selection: Its selection; default: SelectionConfig().
        position: The row's column; -1 is the last one that is not padding, -2 the one before.

    Raises:
        ValueError: The position is outside of the text, the policy evicts or lacks its predictor, the selection has an
            interval, or the batch has more than one row.
    """
    length = _one_row(model, batch)
    policy, predictor = check_policy(policy, predictor)
    real = np.flatnonzero(batch["segments"][0] > 0)
    if not (-real.size <= position < real.size):
        raise ValueError(f"position {position} is outside of the text, which has {real.size} tokens")
    selection = choose_selection(policy, selection)
    limits = limits_of(selection, model.config, length, policy.choosing_heads(model.config))
    column = int(real[position])
    rows = jnp.full((1, 1), column, jnp.int32)
    sets = _find_sets(model, predictor, as_batch(batch), rows, limits, policy=policy, rule=selection.rule)
    served = model.config.served_layers
    return Reading(np.asarray(sets)[:, 0, :, 0], column, policy.name, selection, served)


def _one_row(model: BaseModel, batch: Batch) -> int:
    count, length = batch["tokens"].shape
    if count != 1:
        raise ValueError(f"one text at a time: the batch has {count} rows; take one, batch[name][:1]")
    check_length(model.config, length)
    return length


@jax.jit
def _compare_attention(model, predictor, batch, layer, head):
    base, segments = model.config, batch["segments"]
    x = embed(model, batch["tokens"])
    dense = dense_mixer(base, segments)
    begun, step = importance_walk(predictor, x, batch)
    length = segments.shape[1]
    rows = jnp.arange(length, dtype=jnp.int32)[None]

    def one(a):  # a single head of [B, T, H or K, width]
        return jax.lax.dynamic_slice_in_dim(a, head // (base.heads // a.shape[2]), 1, axis=2)

    def mixer(state, view):
        walk, found = state
        walk, (q_imp, k_imp, _) = step(walk, view)

        def look(sliding_window):
            chunk = row_chunk(
                view._replace(q=one(view.q), k=one(view.k)),
                (one(q_imp), one(k_imp), None),
                segments,
                rows,
                sliding_window,
            )
            both = chunk.logits, chunk.predicted
            sinks = sink_logits(view.weights)
            own = None if sinks is None else grouped_sinks(jax.lax.dynamic_slice_in_dim(sinks, head, 1), 1)
            weights = softmax(chunk.logits, chunk.allowed, own), softmax(chunk.predicted, chunk.allowed)
            seen = (jnp.where(chunk.allowed[:, None, None], a, jnp.nan) for a in both)
            return tuple(a[0, 0, 0] for a in (*weights, *seen))

        found = jax.lax.cond(view.index == layer, lambda: by_sliding_window(base, view.index, look), lambda: found)
        return dense(None, view)[0], (walk, found), None

    empty = (jnp.zeros((length, length), jnp.float32),) * 4
    return run_layers(model, x, batch["positions"], mixer, (begun, empty))[1][1]


@partial(jax.jit, static_argnames=("policy", "rule"))
def _find_sets(model, predictor, batch, rows, limits: Limits, *, policy: Policy, rule: SelectionConfig):
    base, segments = model.config, batch["segments"]
    x = embed(model, batch["tokens"])
    begun, step = importance_walk(predictor, x, batch)

    def mixer(state, view):
        state, importance = step(state, view)

        def attend(sliding_window):
            apply = partial(sparse_chunk, policy=policy, limits=limits, rule=rule, softcap=view.softcap)
            outputs, *_ = map_chunks(apply, view, importance, segments, sliding_window)
            chunk = row_chunk(view, importance, segments, rows, sliding_window)
            sets, _ = chosen_mask(chunk, lambda: policy(chunk.under(rule)), limits, rule)
            return merge_rows(outputs, segments.shape[1]), sets

        output, sets = by_sliding_window(base, view.index, attend)
        return output, state, sets

    return run_layers(model, x, batch["positions"], mixer, begun)[2]
