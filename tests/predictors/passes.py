"""Random models, batches, and passes over them that the predictors' tests share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.model.attention import causal_attention
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, dense_mixer, embed, run_layers
from butler_jax.predictors import walk


def config_of(**changes) -> BaseConfig:
    sizes = dict(vocab_size=61, width=64, hidden=96, layers=4, heads=4, kv_heads=2, head_dim=16, context=64)
    return BaseConfig(**{"family": "llama", **sizes, **changes})


def model_of(**changes) -> BaseModel:
    """A random model whose norms and biases matter too."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name or "bias" in name:
            return jnp.asarray(rng.normal("norm" in name, 0.3, leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(0, 0.125, leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda: BaseModel(config_of(**changes), jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def batch_of(seed: int = 0, rows: int = 2, length: int = 24) -> dict[str, jnp.ndarray]:
    """Two documents in the first row, padding at the end of the second."""
    tokens = np.random.default_rng(seed).integers(1, 61, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segments[0, 15:], segments[1, 20:] = 2, 0
    positions[0, 15:] -= 15
    return {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments), "positions": jnp.asarray(positions)}


@jax.jit
def all_scores(predictor, model, batch):
    """Importance scores [L, B, H, T, S] of every pair, as a pass over whole sequences has them."""
    segments, positions = batch["segments"], batch["positions"]
    context = predictor.context(positions, positions.shape[1])
    dense = dense_mixer(model.config, segments)

    def attend(_, q, k, v):
        return causal_attention(q, k, v, segments=segments), None

    def mixer(state, view):
        step = walk.advance(predictor, state, view, context, attend)
        p = predictor.q_imp(step.head, step.features, view, context)
        r = predictor.k_imp(step.head, step.features, view, context)
        r = jnp.repeat(r, p.shape[2] // r.shape[2], axis=2)
        return dense(None, view)[0], step.state, jnp.einsum("bthr,bshr->bhts", p, r) * p.shape[-1] ** -0.5

    x = embed(model, batch["tokens"])
    return run_layers(model, x, positions, mixer, walk.begin(predictor, x, context))[2]


@jax.jit
def views_of(model, batch):
    """Every layer's view, stacked over layers."""
    dense = dense_mixer(model.config, batch["segments"])
    x = embed(model, batch["tokens"])

    def mixer(carry, view):
        return dense(None, view)[0], carry, {"x": view.x, "q": view.q, "k": view.k, "k_pre": view.k_pre}

    return run_layers(model, x, batch["positions"], mixer, None)[2]
