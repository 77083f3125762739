"""A predictor's scores in a pass over whole sequences: they are causal and independent of packing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.predictors import PREDICTORS, make_predictor
from butler_jax.predictors.config import PredictorConfig
from tests.predictors.passes import all_scores, batch_of, model_of


@pytest.mark.parametrize("kind", PREDICTORS)
def test_scores_never_depend_on_later_tokens(kind):
    model, batch = model_of(layers=6, qkv_bias=True), batch_of()
    predictor = make_predictor(model.config, PredictorConfig(kind=kind, rank=8, stride=2, hidden=32))
    predictor = predictor.initialise(model, [batch])

    def run(tokens):
        return np.asarray(all_scores(predictor, model, {**batch, "tokens": tokens}))

    before = run(batch["tokens"])
    for t in (3, 11):
        tokens = np.array(batch["tokens"])
        tokens[:, t] = (tokens[:, t] + 7) % 61
        after = run(tokens)
        # the same arithmetic on the same numbers: equal but for products that are blocked otherwise
        np.testing.assert_allclose(after[1:, :, :, :t, :t], before[1:, :, :, :t, :t], atol=1e-6)
        assert np.abs(after[1:, :, :, t, :t] - before[1:, :, :, t, :t]).max() > 1e-3
    tokens = np.array(batch["tokens"])
    tokens[0, 15:] = 5  # a second document, seen from the first
    other = run(tokens)
    np.testing.assert_allclose(other[1:, 0, :, :15, :15], before[1:, 0, :, :15, :15], atol=1e-6)


@pytest.mark.slow
def test_a_document_scores_alike_wherever_it_is_packed():
    model, batch = model_of(layers=6), batch_of()
    alone = {k: v[:1, 15:24] for k, v in batch.items()}
    alone["segments"] = jnp.ones_like(alone["segments"])
    for kind in PREDICTORS:
        predictor = make_predictor(model.config, PredictorConfig(kind=kind, rank=8, stride=2, hidden=32))
        packed = all_scores(predictor, model, batch)[1:, :1, :, 15:, 15:]
        # float32 sums over other lengths; scores are below 10
        np.testing.assert_allclose(packed, all_scores(predictor, model, alone)[1:], atol=2e-5)
