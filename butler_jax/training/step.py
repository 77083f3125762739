"""One optimiser step of any training: its state, its schedule, and the jitted function that takes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from butler_jax.parallel import constrain_module
from butler_jax.training.config import FitConfig

Differentiate = Callable[..., tuple[Any, Any, Any]]
"""(module, model, batch, key) -> summed loss, count, and the summed gradient over the module's nnx.Params."""


class TrainState(NamedTuple):
    """What a step changes: its number, the trained module (predictor or base) and the optimiser's state."""

    step: Int[Array, ""]
    module: Any
    optimiser: Any


def start_state(module: Any, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), module, optimiser.init(nnx.state(module, nnx.Param)))


def make_optimiser(config: FitConfig, learning_rate: float) -> optax.GradientTransformation:
    """AdamW with clipping and the schedule of `learning_schedule`; norms and biases do not decay."""
    rate = learning_schedule(config, learning_rate)

    def decaying(parameters):
        def one(path, _):
            return not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias"))

        return jax.tree_util.tree_map_with_path(one, parameters)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=decaying),
    )


def learning_schedule(config: FitConfig, learning_rate: float) -> optax.Schedule:
    """Learning rate by step: a linear warm-up to `learning_rate`, then a cosine to a tenth of it."""
    warmup = max(1, round(config.warmup * config.steps))
    return optax.warmup_cosine_decay_schedule(
        learning_rate / warmup, learning_rate, warmup, max(config.steps, warmup + 1), learning_rate / 10
    )


def make_train_step(
    differentiate: Differentiate,
    config: FitConfig,
    optimiser: optax.GradientTransformation,
    rate: optax.Schedule,
    logical_axes: dict[str, tuple[str, ...]],
) -> Callable[[TrainState, Any, dict], tuple[TrainState, dict[str, Any]]]:
    """The jitted step of a training.

    Args:
        config: Its `accumulate` splits the batch, its `seed` makes the keys.
        logical_axes: Of the module's parameters. On a mesh the gradients and the new state are split by them.

    Returns:
        (state, model, batch) -> (state, metrics). The state is donated. The metrics are loss, gradient_norm and
        learning_rate.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, model, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        take = differentiate if config.accumulate == 1 else partial(accumulate, differentiate, config.accumulate)
        loss, count, gradients = take(state.module, model, batch, key)
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


def accumulate(differentiate: Differentiate, parts: int, module: Any, model: Any, batch: dict, key: Any) -> Any:
    """What `differentiate` returns, summed over equal parts of the batch one after the other.

    Loss and gradient are divided by the count only afterwards, so the parts change rounding alone.
    """
    split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)

    def add(total, scanned):
        part, index = scanned
        fresh = differentiate(module, model, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, fresh), None

    shapes = jax.eval_shape(differentiate, module, model, jax.tree.map(lambda a: a[0], split), key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]
