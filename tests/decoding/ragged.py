"""Rows of different lengths, decoded token by token after short prompts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.decoding import decode_step, prefill
from butler_jax.model import BaseConfig, BaseModel

LENGTHS = (19, 7, 12)
PROMPTS = (5, 1, 4)
CAPACITY = 24


def model_of(**changes) -> BaseModel:
    sizes = dict(vocab_size=61, width=64, hidden=96, layers=4, heads=4, kv_heads=2, head_dim=16, context=64)
    model = BaseModel(BaseConfig(family="qwen2", **{**sizes, **changes}), jax.random.key(0))
    if model.layers.sinks is not None:
        model.layers.sinks[...] = jax.random.normal(jax.random.key(1), model.layers.sinks.shape)
    return model


def rows_of(seed: int = 0) -> np.ndarray:
    """Random tokens of ragged length, 0 beyond each row's end."""
    tokens = np.random.default_rng(seed).integers(1, 61, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    return np.where(np.arange(max(LENGTHS))[None] < np.asarray(LENGTHS)[:, None], tokens, 0)


def decoded(model, tokens, predictor=None):
    """Logits and scores after every token of every row, by prefill of short ragged prompts and single steps."""
    prompts = np.asarray(PROMPTS)
    first = jnp.asarray(np.where(np.arange(max(PROMPTS))[None] < prompts[:, None], tokens[:, : max(PROMPTS)], 0))
    fill = jax.jit(lambda t, n: prefill(model, t, n, capacity=CAPACITY, predictor=predictor))
    found, state = fill(first, jnp.asarray(prompts))
    step = jax.jit(lambda t, s: decode_step(model, t, s, predictor=predictor, details=True), donate_argnums=1)
    logits = {(b, prompts[b] - 1): np.asarray(found[b]) for b in range(len(prompts))}
    scores = {}
    for _ in range(max(LENGTHS) - min(PROMPTS)):
        at = np.asarray(state.lengths)
        inside = np.minimum(at, np.asarray(LENGTHS) - 1)
        found, state, looked = step(jnp.asarray(tokens[np.arange(len(at)), inside]), state)
        for b in np.flatnonzero(at < np.asarray(LENGTHS)):
            logits[b, at[b]] = np.asarray(found[b])
            if looked.scores is not None:
                scores[b, at[b]] = np.asarray(looked.scores[:, b])
    return logits, scores
