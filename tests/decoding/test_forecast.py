"""What the predictor says of a layer: the same step by step as in one pass over the whole sequence."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model import causal_attention, dense_mixer, embed, run_layers
from butler_jax.predictors import PredictorConfig, make_predictor, walk
from tests.decoding.ragged import LENGTHS, decoded, model_of, rows_of


@pytest.mark.parametrize(
    "kind", ["lookahead", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("contextual", "producer"))]
)
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
