"""The contextual predictor: its rotary embedding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.config import RopeConfig
from butler_jax.predictors import make_predictor
from butler_jax.predictors.base import at
from butler_jax.predictors.config import PredictorConfig
from tests.predictors.passes import all_scores, batch_of, model_of


@pytest.mark.slow
def test_contextual_follows_the_rotary_embedding_of_the_base():
    def scores(rope: RopeConfig, stretch: int):
        model, batch = model_of(rope=rope), batch_of()
        predictor = make_predictor(model.config, PredictorConfig(kind="contextual", rank=8, hidden=32))
        batch["positions"] = batch["positions"] * stretch
        return np.asarray(all_scores(predictor, model, batch))[1:]

    plain = scores(RopeConfig(theta=100.0), 1)
    # linear interpolation by 4 at four times the positions is no interpolation; exact powers of two
    np.testing.assert_allclose(scores(RopeConfig(theta=100.0, kind="linear", factor=4.0), 4), plain, atol=1e-5)
    assert np.abs(scores(RopeConfig(theta=5000.0), 1) - plain).max() > 1e-3
    assert np.abs(scores(RopeConfig(theta=100.0, kind="linear", factor=4.0), 1) - plain).max() > 1e-3


def test_contextual_importance_is_rotated_by_relative_position():
    model = model_of(rope=RopeConfig(theta=100.0))
    predictor = make_predictor(model.config, PredictorConfig(kind="contextual", rank=8, hidden=32))
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 6, 32)), jnp.float32)
    positions = jnp.asarray([[3, 4, 9, 10, 30, 31]], jnp.int32)
    context = predictor.context(positions, 64)
    found = np.asarray(predictor.q_imp(at(predictor.heads, 0), (hidden, hidden), None, context))
    flat = np.einsum("bti,ihr->bthr", hidden, np.asarray(predictor.heads.query[...])[0])
    turns = np.exp(1j * np.asarray(positions)[..., None, None] * 100.0 ** (-np.arange(4) / 4))
    turned = (flat[..., :4] + 1j * flat[..., 4:]) * turns
    # float32 angles of up to 31 radians
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)
