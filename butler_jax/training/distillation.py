"""Distillation: one pass through the frozen base that yields the predictor's loss and its gradients.

The base is never differentiated, so the gradient of layer l's loss reaches only that layer's head and its producer's
features. Both are taken inside the scan over layers, where q and k already are: nothing is stacked over layers but
the gradients themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from butler_jax.data import read_batches, read_held_out
from butler_jax.model import (
    LOGICAL_AXES,
    BaseModel,
    by_window,
    causal_attention,
    check_length,
    embed,
    forward,
    run_layers,
)
from butler_jax.parallel import agree, make_mesh, own_rows, place, place_batch, rows_here
from butler_jax.policies import make_policy
from butler_jax.predictors import PREDICTORS, Predictor, PredictorConfig, at, make_predictor, walk
from butler_jax.runs import about, claim
from butler_jax.simulation import measure_recall
from butler_jax.training import losses
from butler_jax.training.config import TrainConfig
from butler_jax.training.loop import check_run, fit, open_run
from butler_jax.training.step import learning_schedule, make_optimiser, make_train_step, start_state
from butler_jax.weights import Base

VALIDATION_ROWS = 8  # held-out rows a validation reads
RECALL_BUDGET = 0.25  # of the recalled mass that is logged
RECALL_ROWS = 256  # query rows of each held-out row that are measured

OBJECTIVES = ("cross_entropy", "squared_error")


class Carry(NamedTuple):
    """What the scan over layers hands on: the predictor's walk, its gradients so far, the sums."""

    walk: walk.Walk
    feature_gradients: Any
    trunk_gradients: Any
    loss: Float[Array, ""]
    count: Float[Array, ""]


def distil_pass(
    model: BaseModel,
    predictor: Predictor,
    batch: dict[str, Int[Array, "B T"]],
    *,
    objective: str,
    sinks: int = 0,
    recent: int = 0,
    dropout: Key[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Any]:
    """Summed loss, count, and the gradient of the sum in the shape of nnx.state(predictor, nnx.Param).

    The loss is averaged over layers 1 ... L-1 before it is summed over rows and heads (cross entropy, nats a row) or
    pairs and heads (squared error): divide loss and gradient by the count. batch: tokens, segments and positions as
    data.batches gives them. sinks, recent: keys that the cross entropy leaves out, see
    losses.attention_and_cross_entropy. Raises ValueError for an unknown objective.
    """
    config = model.config
    segments, positions = batch["segments"], batch["positions"]
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    if objective == "cross_entropy":
        attend_with_loss = partial(losses.attention_and_cross_entropy, sinks=sinks, recent=recent)
    else:
        attend_with_loss = losses.attention_and_squared_error
    context = predictor.context(positions, positions.shape[1])
    trunk = predictor.trunk

    def trunk_attend(_, q, k, v):
        return causal_attention(q, k, v, segments=segments, implementation=implementation), None

    def mixer(carry: Carry, view):
        step = walk.step(predictor, carry.walk, view, context, trunk_attend, dropout)
        graph, weights, constants = nnx.split(step.head, nnx.Param, ...)

        def layer_loss(weights, features):
            head = nnx.merge(graph, weights, constants)
            p = predictor.q_imp(head, features, view, context)
            r = predictor.k_imp(head, features, view, context)

            def attend(sliding_window):
                return attend_with_loss(
                    view.q,
                    view.k,
                    view.v,
                    p,
                    r,
                    segments=segments,
                    sliding_window=sliding_window,
                    implementation=implementation,
                )

            output, loss, count = by_window(config, view.index, attend)
            serves = step.place.serves.astype(jnp.float32) / (config.layers - 1)
            return loss * serves, (output, count * serves)

        wanted = (0,) if trunk is None else (0, 1)  # without a trunk the features are the frozen stream itself
        value, gradients = jax.value_and_grad(layer_loss, wanted, has_aux=True)(weights, step.features)
        loss, (output, count) = value
        feature_gradients, trunk_gradients = carry.feature_gradients, carry.trunk_gradients
        if trunk is not None:
            feature_gradients = jax.tree.map(
                lambda old, new: jnp.where(step.place.starts, 0, old) + new, feature_gradients, gradients[1]
            )
            trunk_gradients = jax.lax.cond(
                step.place.ends,
                lambda: pull(step.place.producer, carry.walk.captured, feature_gradients, trunk_gradients),
                lambda: trunk_gradients,
            )
        new = Carry(step.state, feature_gradients, trunk_gradients, carry.loss + loss, carry.count + count)
        return output, new, gradients[0]

    def pull(producer, captured, feature_gradients, trunk_gradients):
        """Trunk gradients with those of this producer, from the features' summed over its block."""

        def features_of(one):
            attend = partial(trunk_attend, None)
            return predictor.features(one, captured, context, attend, dropout)[0]

        _, vjp = jax.vjp(features_of, at(trunk, producer))
        return jax.tree.map(lambda all_, g: all_.at[producer].set(g), trunk_gradients, vjp(feature_gradients)[0])

    x = embed(model, batch["tokens"])
    first = walk.begin(predictor, x, context)
    start = Carry(first, first.features, jax.tree.map(jnp.zeros_like, trunk), jnp.zeros(()), jnp.zeros(()))
    _, end, stacked = run_layers(model, x, positions, mixer, start)

    def fit(gradient, parameter):  # layer 0 has no head; a producer's last slots may lie beyond the last layer
        gradient = gradient[1:]
        missing = parameter.shape[0] - gradient.shape[0]
        return jnp.pad(gradient, [(0, missing)] + [(0, 0)] * (gradient.ndim - 1))

    parameters = nnx.state(predictor, nnx.Param)
    gradients = jax.tree.map(fit, stacked, nnx.state(predictor.heads, nnx.Param)), end.trunk_gradients
    return end.loss, end.count, jax.tree.unflatten(jax.tree.structure(parameters), jax.tree.leaves(gradients))


def objective_pass(config: TrainConfig) -> Any:
    """distil_pass with the objective, the contested keys and the attention that the settings say."""
    return partial(
        distil_pass,
        objective=config.objective or PREDICTORS[config.predictor].objective,
        sinks=config.sinks,
        recent=config.recent,
        implementation=config.attention,
    )


def distil_step(config: TrainConfig) -> tuple[Any, optax.GradientTransformation]:
    """The jitted step of these settings, as training.make_train_step describes it, and its optimiser."""
    one_pass = objective_pass(config)
    kind = PREDICTORS[config.predictor]
    rate = config.learning_rate or kind.learning_rate
    optimiser = make_optimiser(config, rate)

    def gradient_pass(predictor, model, batch, key):
        return one_pass(model, predictor, batch, dropout=key)

    schedule = learning_schedule(config, rate)
    return make_train_step(gradient_pass, config, optimiser, schedule, kind.logical_axes), optimiser


def init_predictor(
    base: Base, config: PredictorConfig | None = None, *, batches: list[dict] = (), seed: int = 0
) -> Predictor:
    """The predictor a training run starts from.

    batches (as data.batches gives them) are what the lookahead predictor chooses its rotary pairs on; without any, it
    raises ValueError. The others draw random parameters from `seed` alone.
    """
    return make_predictor(base.config, config or PredictorConfig(), seed).initialise(base.model, list(batches))


def default_run_dir(config: TrainConfig) -> Path:
    """runs/BASE-PREDICTOR-DATA, a data specification of more than one word by a digest of it."""
    source, *more = re.split(r"[:+]", config.data)
    if more:
        source += "-" + hashlib.sha256(config.data.encode()).hexdigest()[:6]
    name = Path(config.base).name.removesuffix(".gguf")
    return Path("runs") / f"{name}-{config.predictor}-{source}"


def distil(base: Base, config: TrainConfig | None = None, *, predictor: Predictor | None = None) -> Predictor:
    """Train a predictor for `base` as `config` says and return it; the run's directory holds everything else.

    Calling it again with the same settings goes on from the newest checkpoint. predictor: where to start, instead of
    init_predictor. Raises ValueError for settings that do not fit the base, the data or the devices, and where another
    process trains in that directory; OSError where it cannot be written.
    """
    config = config or TrainConfig()
    if config.base == "tiny" != base.name:  # the configuration was not told which base it is for
        config = dataclasses.replace(config, base=base.name)
    base.require_tokenizer()
    check_length(base.config, config.length)
    mesh = make_mesh(config.mesh, batch_size=config.batch_size // config.accumulate)
    kind = PREDICTORS[config.predictor]
    run_dir = config.run_dir or default_run_dir(config)
    with claim(run_dir), jax.set_mesh(mesh):
        check_run(run_dir, config)
        agree({"base": base.fingerprint})
        model = place(base.model, LOGICAL_AXES, mesh)
        source = {"length": config.length, "batch_size": config.batch_size, "data_dir": config.data_dir}
        rows = rows_here(config.batch_size, mesh)
        batches = read_batches(config.data, base.tokenizer, seed=config.seed, rows=rows, **source)
        held_out = read_held_out(
            config.data, base.tokenizer, count=max(1, VALIDATION_ROWS // config.batch_size), **source
        )
        held_out = [place_batch(own_rows(b, mesh), mesh) for b in held_out]
        if predictor is None:
            calibration = read_batches(config.data, base.tokenizer, seed=config.seed + 1, rows=rows, **source)
            first = [place_batch(next(calibration), mesh) for _ in range(config.calibration)]
            predictor = init_predictor(
                Base(base.name, model, base.tokenizer, base.fingerprint),
                config.predictor_config(),
                batches=first,
                seed=config.seed,
            )
        predictor = place(predictor, kind.logical_axes, mesh)
        one_pass = objective_pass(config)

        @jax.jit
        def validation_loss(predictor, model, batch):
            loss, count, _ = one_pass(model, predictor, batch)
            return loss, count

        def validate(predictor):
            losses = [validation_loss(predictor, model, b) for b in held_out]
            loss, count = (sum(float(x) for x in column) for column in zip(*losses, strict=True))
            found = measure_recall(
                model, predictor, held_out, [make_policy("tokenbutler")], [RECALL_BUDGET], rows=RECALL_ROWS, ranks=False
            )
            hit_rate = found.hit_rate.get("tokenbutler")
            return {
                "validation_loss": loss / max(count, 1.0),
                "hit_rate": hit_rate.value if hit_rate else 0.0,
                "recalled_mass": found.mass["tokenbutler"][RECALL_BUDGET].value,
            }

        step, optimiser = distil_step(config)
        open_run(run_dir, config)  # not before everything else was found in order
        state = fit(
            step,
            start_state(predictor, optimiser),
            model,
            batches,
            config,
            mesh=mesh,
            run_dir=run_dir,
            about=about(base, predictor.config),
            validate=validate,
            forward_seconds=_forward_seconds(model, held_out[0], config),
        )
    return state.module


def _forward_seconds(model: BaseModel, batch: dict, config: TrainConfig) -> float:
    """Seconds of the base's own forward pass to logits on such a batch: the best of three after compiling."""

    @jax.jit
    def run(model, batch):
        logits = forward(
            model,
            batch["tokens"],
            positions=batch["positions"],
            segments=batch["segments"],
            implementation=config.attention,
        )
        return logits.max(-1)

    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(run(model, batch))
        times.append(time.perf_counter() - began)
    return min(times[1:])
