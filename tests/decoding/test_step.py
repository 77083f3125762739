"""Decoding step by step: the same logits and the same importance scores as one pass over the whole sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding.prefilling import prefill
from butler_jax.decoding.step import decode_step
from butler_jax.model.attention import causal_attention
from butler_jax.model.config import BaseConfig, RopeConfig
from butler_jax.model.decoder import BaseModel, dense_mixer, embed, forward, run_layers
from butler_jax.predictors import PREDICTORS, make_predictor, walk
from butler_jax.predictors.config import PredictorConfig

LENGTHS = (19, 7, 12)
PROMPTS = (5, 1, 4)
CAPACITY = 24


def model_of(**changes) -> BaseModel:
    sizes = dict(vocab_size=61, width=64, hidden=96, layers=4, heads=4, kv_heads=2, head_dim=16, context=64)
    return BaseModel(BaseConfig(family="qwen2", **{**sizes, **changes}), jax.random.key(0))


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


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "kv_heads": 1, "sliding_window": 5, "sliding_layers": (True, False) * 2},
        {
            "rope": RopeConfig(
                kind="longrope", original_context=16, short_factor=(1.0,) * 8, long_factor=(1.0, 2.0) * 4, factor=4.0
            )
        },
    ],
    ids=["bias and windows", "longrope"],
)
def test_decoding_step_by_step_equals_the_full_pass(changes):
    model, tokens = model_of(**changes), rows_of()
    padded = np.pad(tokens, ((0, 0), (0, CAPACITY - tokens.shape[1])))  # longrope plans for the cache's capacity
    full = np.asarray(jax.jit(forward)(model, jnp.asarray(padded)))
    logits, _ = decoded(model, tokens)
    assert len(logits) == sum(LENGTHS) - sum(PROMPTS) + len(PROMPTS)
    for (b, t), found in logits.items():
        # float32 sums in another order; logits are about 1
        np.testing.assert_allclose(found, full[b, t], atol=2e-5)


@pytest.mark.parametrize("kind", sorted(PREDICTORS))
def test_scores_of_decoding_equal_those_of_the_training_pass(kind):
    model, tokens = model_of(qkv_bias=True), rows_of(1)
    shape = tokens.shape
    segments = jnp.asarray(np.arange(shape[1])[None] < np.asarray(LENGTHS)[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    batch = {"tokens": jnp.asarray(tokens), "segments": segments, "positions": positions}
    predictor = make_predictor(model.config, PredictorConfig(kind=kind, rank=8, stride=2, hidden=32))
    predictor = predictor.initialise(model, [batch])
    context = predictor.context(positions, shape[1])
    dense = dense_mixer(model.config, segments)

    def mixer(state, view):
        step = walk.advance(
            predictor, state, view, context, lambda _, q, k, v: (causal_attention(q, k, v, segments=segments), None)
        )
        p = predictor.q_imp(step.head, step.features, view, context)
        r = predictor.k_imp(step.head, step.features, view, context)
        return dense(None, view)[0], step.state, (p, r)

    x = embed(model, batch["tokens"])
    _, _, (p, r) = run_layers(model, x, positions, mixer, walk.begin(predictor, x, context))
    p, r = np.asarray(p, np.float64), np.asarray(r, np.float64)
    r = np.repeat(r, p.shape[3] // r.shape[3], axis=3)
    _, scores = decoded(model, tokens, predictor)
    assert scores
    for (b, t), found in scores.items():
        for layer in range(1, model.config.layers):
            expected = np.einsum("hr,shr->hs", p[layer, b, t], r[layer, b, : t + 1]) / np.sqrt(p.shape[-1])
            # float32 sums in another order; scores are below 10
            np.testing.assert_allclose(found[layer, :, : t + 1], expected, atol=5e-5)
            assert np.isneginf(found[layer, :, t + 1 :]).all()


def test_a_prompt_longer_than_the_cache_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="prompts of 8 tokens do not fit a cache of 4"):
        prefill(model, jnp.ones((1, 8), jnp.int32), jnp.asarray([8]), capacity=4)
    with pytest.raises(ValueError, match="cache of 128 tokens is beyond the model's context of 64"):
        prefill(model, jnp.ones((1, 8), jnp.int32), jnp.asarray([8]), capacity=128)
