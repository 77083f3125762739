"""One optimiser step of any training: its state, its schedule, and the jitted function that takes it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from butler_jax.parallel import constrain_module
from butler_jax.training.config import FitConfig


class TrainState(NamedTuple):
    """What a step changes: its number, the trained module (predictor or base) and the optimiser's state."""

    step: Int[Array, ""]
    module: Any
    optimiser: Any


def make_optimiser(config: FitConfig, learning_rate: float) -> optax.GradientTransformation:
    """AdamW with clipping, a linear warm-up and a cosine to a tenth of the peak; matrices alone decay."""
    rate = learning_schedule(config, learning_rate)

    def matrices(parameters):
        def one(path, _):
            return not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias"))

        return jax.tree_util.tree_map_with_path(one, parameters)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=matrices),
    )


def learning_schedule(config: FitConfig, learning_rate: float) -> optax.Schedule:
    """Learning rate by step."""
    warmup = max(1, round(config.warmup * config.steps))
    return optax.warmup_cosine_decay_schedule(
        learning_rate / warmup, learning_rate, warmup, max(config.steps, warmup + 1), learning_rate / 10
    )


def make_train_step(
    gradient_pass,
    config: FitConfig,
    optimiser: optax.GradientTransformation,
    rate: optax.Schedule,
    logical_axes: dict[str, tuple[str, ...]],
):
    """(state, model, batch) -> (state, metrics), jitted, the state donated.

    gradient_pass(module, model, batch, key) returns the summed loss, the count and the summed gradient over the
    module's nnx.Params; parts of an accumulated batch are added up before the division, so accumulation changes
    rounding only. metrics: loss, gradient_norm, learning_rate. logical_axes: of the module's parameters; on a mesh the
    new state, and the gradients before it, are split by it as the old one is.
    """

    def summed(module, model, batch, key):
        if config.accumulate == 1:
            return gradient_pass(module, model, batch, key)
        parts = jax.tree.map(lambda a: a.reshape(config.accumulate, -1, *a.shape[1:]), batch)

        def one(total, scanned):
            part, index = scanned
            fresh = gradient_pass(module, model, part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, fresh), None

        shapes = jax.eval_shape(gradient_pass, module, model, jax.tree.map(lambda a: a[0], parts), key)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(one, zeros, (parts, jnp.arange(config.accumulate)))[0]

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, model, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, count, gradients = summed(state.module, model, batch, key)
        count = jnp.maximum(count, 1.0)
        gradients = constrain_module(gradients, logical_axes)
        gradients = jax.tree.map(lambda g: g / count.astype(g.dtype), gradients)
        graph, parameters, rest = nnx.split(state.module, nnx.Param, ...)
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, parameters)
        module = nnx.merge(graph, optax.apply_updates(parameters, updates), rest)
        metrics = {
            "loss": loss / count,
            "gradient_norm": optax.global_norm(gradients),
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
        }
        return constrain_module(TrainState(state.step + 1, module, optimiser_state), logical_axes), metrics

    return step


def start_state(module: Any, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), module, optimiser.init(nnx.state(module, nnx.Param)))
