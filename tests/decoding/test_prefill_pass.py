"""Prompts at once and in chunks fill the same caches, and prompts that do not fit are refused."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding import prefill
from butler_jax.model import BaseModel
from butler_jax.predictors import PredictorConfig, make_predictor
from tests.decoding.letters import BASE
from tests.decoding.ragged import model_of


@pytest.mark.parametrize("kind", ["lookahead", pytest.param("contextual", marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [None, pytest.param(7, marks=pytest.mark.slow)])
def test_a_prompt_in_chunks_fills_the_same_caches(kind, window):
    model = BaseModel(dataclasses.replace(BASE, sliding_window=window), jax.random.key(1))
    predictor = make_predictor(model.config, PredictorConfig(kind=kind, rank=8, stride=2, hidden=16))
    lengths = np.asarray([22, 7, 16])
    tokens = np.random.default_rng(0).integers(1, 61, (3, 26)).astype(np.int32)
    run = partial(jax.jit(prefill, static_argnames=("capacity", "chunk")), model, jnp.asarray(tokens), lengths)
    logits, whole = run(capacity=32, predictor=predictor)
    found, parts = run(capacity=32, predictor=predictor, chunk=8)
    # float32 sums in another order; logits and keys are about 1
    np.testing.assert_allclose(found, logits, atol=2e-5)
    for b, held in enumerate(lengths):
        for name in ("k", "v"):
            a, c = (np.asarray(getattr(s.kv, name))[:, b, :, :held] for s in (whole, parts))
            np.testing.assert_allclose(c, a, atol=2e-5)
        a, c = (np.asarray(s.scores.k_imp)[1:, b, ..., :held] for s in (whole, parts))
        np.testing.assert_allclose(c, a, atol=2e-5)


def test_a_prompt_longer_than_the_cache_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="prompts of 8 tokens do not fit a cache of 4"):
        prefill(model, jnp.ones((1, 8), jnp.int32), jnp.asarray([8]), capacity=4)
    with pytest.raises(ValueError, match="cache of 128 tokens is beyond the model's context of 64"):
        prefill(model, jnp.ones((1, 8), jnp.int32), jnp.asarray([8]), capacity=128)
