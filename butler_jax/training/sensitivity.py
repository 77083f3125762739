"""How much an error in the residual stream changes the next tokens, layer by layer.

A trained predictor predicts the error of each unread token relative to the norm of the stream. The same relative error
costs more in some layers than in others. The Fisher information tells how much: where g is the gradient of the
log-likelihood of tokens that are drawn from the model's own predictions, a small change e of the stream changes these
predictions by a divergence of E[(g . e)^2] / 2 on average.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from butler_jax.data import Batch, as_batch, require_batches
from butler_jax.model import (
    BaseModel,
    dense_mixer,
    document_places,
    embed,
    logits,
    output_projection,
    require_loaded,
    run_layers,
)
from butler_jax.predictors import Predictor
from butler_jax.weights import Base

LOGIT_ROWS = 64  # rows of logits formed at a time


def weigh_errors(base: Base, predictor: Predictor, batches: Sequence[Batch], *, seed: int = 0) -> Predictor:
    """A predictor whose errors count as much as they change the next tokens.

    The scores of each layer rise or fall by one number, whose mean over the layers is 0. So the allocations per_head
    and per_layer choose as before, and under one tolerance the layers share their reads by what an error costs. A
    tolerance has to be calibrated anew. A training that starts from the result goes back to errors in the stream.

    Args:
        base: The model whose tokens the predictor scores.
        predictor: With an offset, so that its scores are logarithms of errors; it is not changed.
        batches: tokens, segments, positions of [B, T], as `read_batches` gives them; some thousand tokens are enough.
            Each row takes a pass of the base and its gradient.
        seed: Of the tokens that are drawn.

    Raises:
        ValueError: The predictor has no offset or is another base's, or there are no batches or only padding.
    """
    require_loaded(base, predictor)
    require_batches(batches)
    if not batches:
        raise ValueError("errors are weighed on text: give at least one batch, as read_batches gives them")
    if predictor.config.offset == "none":
        raise ValueError(
            "the predictor scores attention, not errors, so nothing can be weighed; train one with --target centred"
        )
    total = 0.0
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        total = total + np.asarray(measure_sensitivity(base.model, as_batch(batch), key), np.float64)
    served = total[np.asarray(base.config.served_layers)]
    if not np.all((served > 0) & np.isfinite(served)):
        raise ValueError("the batches do not tell what an error costs in every layer; give batches that hold text")
    costs = np.log(served) / 2
    return predictor.shift_offset(jnp.asarray(costs - np.mean(costs), jnp.float32))


@jax.jit
def measure_sensitivity(
    model: BaseModel, batch: dict[str, Int[Array, "B T"]], key: Key[Array, ""]
) -> Float[Array, " L"]:
    """Twice the divergence that relative errors of norm 1 add up to, summed over the rows that are not padding.

    It is the mean over directions: those of the attention's outputs, which a layer projects into the stream.
    """

    def one(row):
        batch, key = row
        return _sensitivity(model, {name: a[None] for name, a in batch.items()}, key)

    keys = jax.random.split(key, len(batch["tokens"]))
    return jnp.sum(jax.lax.map(one, (batch, keys)), axis=0)


def _sensitivity(model: BaseModel, batch: dict[str, Int[Array, "1 T"]], key: Key[Array, ""]) -> Float[Array, " L"]:
    config, segments = model.config, batch["segments"]
    dense = dense_mixer(config, segments)

    def log_likelihood(changes):
        def mixer(carry, view):
            mixed = dense(None, view)[0]
            squares = jnp.sum(jnp.square(view.x.astype(jnp.float32)), axis=-1)
            scale = jnp.sum(jnp.square(output_projection(view.weights).astype(jnp.float32)))
            return mixed + changes[view.index].astype(mixed.dtype), carry, squares / scale

        x = embed(model, batch["tokens"])
        x, _, relative = run_layers(model, x, batch["positions"], mixer, None, near=document_places(segments))
        return _draw(model, x[0], segments[0] > 0, key), relative

    shape = (config.layers, *segments.shape, config.heads, config.head_dim)
    gradients, relative = jax.grad(log_likelihood, has_aux=True)(jnp.zeros(shape))
    squares = jnp.sum(jnp.square(gradients), axis=(-2, -1))
    return jnp.sum(jnp.where(segments > 0, squares * relative, 0.0), axis=(1, 2))


def _draw(
    model: BaseModel, x: Float[Array, "T E"], counted: Bool[Array, " T"], key: Key[Array, ""]
) -> Float[Array, ""]:
    """The log-likelihood of next tokens that are drawn from the model's own predictions, over the rows that count."""
    pad = -len(x) % LOGIT_ROWS
    x, counted = jnp.pad(x, ((0, pad), (0, 0))), jnp.pad(counted, (0, pad))

    @jax.checkpoint
    def one(rows):
        x, counted, key = rows
        logs = jax.nn.log_softmax(logits(model, x).astype(jnp.float32))
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logs))
        return jnp.sum(jnp.where(counted, jnp.take_along_axis(logs, drawn[:, None], axis=-1)[:, 0], 0.0))

    parts = x.reshape(-1, LOGIT_ROWS, x.shape[-1]), counted.reshape(-1, LOGIT_ROWS)
    return jnp.sum(jax.lax.map(one, (*parts, jax.random.split(key, len(parts[0])))))
