"""Thresholds that reach a mean budget: a row reads the tokens that score above them, so some rows read fewer.

A policy that normalises its scores (to the logarithm of a predicted attention weight) makes those of one layer and KV
head comparable between rows. So one threshold for each layer and head is calibrated on text. The budget of the
selection stays the most that a row may read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.model import BaseModel, by_sliding_window, dense_mixer, embed, run_layers
from butler_jax.policies import Policy, Scoring, TokenButler
from butler_jax.predictors import Predictor
from butler_jax.selection import Limits, SelectionConfig, limits_of
from butler_jax.simulation.choice import chosen_mask, with_rule
from butler_jax.simulation.chunks import importance_walk, map_chunks
from pallas_kernels import BARRED, from_image

PASSES = 16  # bits of a threshold: a precision of 2**-7 of its value


def calibrate_thresholds(
    model: BaseModel,
    predictor: Predictor | None,
    batches: Sequence[dict[str, np.ndarray]],
    selection: SelectionConfig,
    mean: float | int,
    *,
    policy: Policy | None = None,
) -> SelectionConfig:
    """Find thresholds under which a row reads `mean` on average, in every layer and head.

    Args:
        predictor: Needed by policies with `needs_predictor`.
        batches: tokens, segments, positions of one shape [B, T], run densely PASSES times.
        selection: Its budget is the most that a row reads.
        mean: A fraction of the keys that a dense query reads, or a number of tokens. Where sinks and recent tokens
            alone exceed it, thresholds are infinite.
        policy: Default: tokenbutler.

    Returns:
        The selection with thresholds.

    Raises:
        ValueError: There are no batches, the mean is not below the budget, or the policy lacks its predictor.
    """
    policy = policy or TokenButler()
    whole = isinstance(mean, int)
    if not batches:
        raise ValueError("thresholds are calibrated on text: give at least one batch")
    if not (mean > 0 and (whole or mean < 1)):
        raise ValueError(f"the mean budget must be above 0 and below everything, got {mean}")
    if isinstance(selection.budget, int) == whole and mean >= selection.budget:
        raise ValueError(f"a mean budget of {mean} must be below the most a row may read, {selection.budget}")
    if not isinstance(policy, Scoring) or policy.reads_everything:
        raise ValueError(f"the policy {policy.name} has no scores to set thresholds on; take a policy that scores")
    predictor = policy.require_predictor(predictor)
    selection = policy.selection(selection)
    batches = [{n: jnp.asarray(b[n]) for n in ("tokens", "segments", "positions")} for b in batches]
    limits = limits_of(dataclasses.replace(selection, threshold=None), model.config, batches[0]["tokens"].shape[1])
    found = np.full((model.config.layers, policy.choosing_heads(model.config)), int(BARRED))
    for bit in range(31, 31 - PASSES, -1):  # the largest image under which the mean is still reached
        trial, total, rows = (found + (1 << bit)).astype(np.int32), 0.0, 0.0
        for batch in batches:
            part = _sum_read(model, predictor, batch, limits, trial, policy=policy, rule=selection.rule, whole=whole)
            total, rows = total + np.asarray(part[0], np.float64), rows + float(part[1])
        found = np.where(total / rows >= mean, trial, found)
    found = np.minimum(found + (1 << (31 - PASSES)), 2**31 - 1)  # the next one above, at which the mean is not exceeded
    values = np.asarray(from_image(jnp.asarray(found.astype(np.int32))))
    values = np.where(np.isnan(values), np.inf, values)
    values[0] = -np.inf
    return dataclasses.replace(selection, threshold=tuple(map(tuple, values.tolist())))


@partial(jax.jit, static_argnames=("policy", "rule", "whole"))
def _sum_read(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    limits: Limits,
    image: Int[Array, "L K"],
    *,
    policy: Policy,
    rule: SelectionConfig,
    whole: bool,
) -> tuple[Float[Array, "L K"], Float[Array, ""]]:
    """What every layer and head reads, summed over the rows that are not padding, and the number of these rows."""
    base, segments, positions = model.config, batch["segments"], batch["positions"]
    limits = limits._replace(threshold=from_image(image))
    x = embed(model, batch["tokens"])
    dense = dense_mixer(base, segments)
    begun, step = importance_walk(predictor, x, batch)
    real = jnp.pad(segments > 0, ((0, 0), (0, 1)))  # rows beyond the end take the last column

    def one(chunk):
        mask, count = chosen_mask(chunk, policy(with_rule(chunk, rule)), limits, rule)
        read = jnp.sum(mask, axis=-1, dtype=jnp.int32).astype(jnp.float32)
        if not whole:
            read = read / jnp.maximum(count, 1).astype(jnp.float32)[:, None]
        inside = jnp.take_along_axis(real, jnp.minimum(chunk.rows.own, segments.shape[1]), axis=1)
        return jnp.sum(jnp.where(inside[:, None], read, 0.0), axis=(0, 2))

    def mixer(state, view):
        state, importance = step(state, view)

        def measure(sliding_window):
            return jnp.sum(map_chunks(one, view, importance, segments, sliding_window)[0], axis=0)

        return dense(None, view)[0], state, by_sliding_window(base, view.index, measure)

    sums = run_layers(model, x, positions, mixer, begun)[2]
    return sums, jnp.sum(segments > 0).astype(jnp.float32)
