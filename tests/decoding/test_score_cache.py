"""k_imp in int8: half a step of error at most, and decoding goes by exactly what is stored."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import butler_jax
from butler_jax.decoding import score_cache
from butler_jax.decoding.prefill_pass import prefill
from butler_jax.decoding.score_cache import ScoreCache, append_scores
from butler_jax.decoding.step import decode_step
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import measure_recall
from butler_jax.weights import Base

BASE = BaseConfig(
    family="llama", vocab_size=61, width=64, hidden=96, layers=4, heads=4, kv_heads=2, head_dim=16, context=128
)
LENGTHS = jnp.asarray([40, 23])
SELECTION = SelectionConfig(budget=0.4, sinks=2, recent=3)


@pytest.fixture(scope="module")
def model():
    model = BaseModel(BASE, jax.random.key(0))
    model.layers.q[...] = model.layers.q[...] * 4
    return model


@pytest.fixture(scope="module")
def predictor(model):
    return make_predictor(BASE, PredictorConfig(rank=8, stride=2))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 40)), jnp.int32)


@pytest.fixture(scope="module")
def states(model, predictor, tokens):
    fill = jax.jit(partial(prefill, capacity=64), static_argnames=("score_dtype", "chunk"))
    return {
        name: fill(model, tokens, LENGTHS, predictor=predictor, **settings)[1]
        for name, settings in {
            "float": {},
            "int8": {"score_dtype": "int8"},
            "chunks": {"score_dtype": "int8", "chunk": 16},
        }.items()
    }


def test_keys_of_a_prompt_are_within_half_a_step(states):
    exact, whole = states["float"].scores, states["int8"].scores
    assert whole.k_imp.dtype == jnp.int8 and whole.scales.shape == whole.k_imp.shape[:3]
    assert states["float"].scores.scales is None
    error = np.abs(np.asarray(score_cache.restored(whole.k_imp, whole.scales) - exact.k_imp))
    for row, length in enumerate(LENGTHS):
        held = slice(score_cache.SINKS, int(length))
        limit = np.asarray(whole.scales)[1:, row, :, None, None] * 0.501  # half a step, and float32 rounding
        assert (error[1:, row, :, :, held] <= limit).all()
        assert not np.asarray(whole.k_imp)[:, row, :, :, int(length) :].any()


def test_chunks_of_a_prompt_store_the_same(states):
    at_once, chunks = states["int8"].scores, states["chunks"].scores
    np.testing.assert_allclose(chunks.scales, at_once.scales, rtol=1e-5)
    apart = np.abs(np.asarray(chunks.k_imp[1:], np.int32) - np.asarray(at_once.k_imp[1:], np.int32))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01  # sums in another order may fall on the other side of a half


def test_later_keys_use_the_scale_and_saturate():
    new = jnp.asarray([[[[0.5, -3.0]]]])  # [L, B, Q, R]
    scores = ScoreCache(jnp.zeros((1, 1, 1, 2, 4), jnp.int8), None, jnp.full((1, 1, 1), 0.01))
    keys = np.asarray(append_scores(scores, new, jnp.asarray([2]), None).k_imp)[0, 0, 0]
    assert keys[:, 2].tolist() == [50, -127] and not keys[:, [0, 1, 3]].any()


def test_first_tokens_do_not_widen_the_scale():
    keys = jnp.ones((1, 1, 2, 8)).at[..., :4].set(100.0)
    # five times the root mean square, which is 1, is above the largest
    assert score_cache.scales_of(keys, jnp.arange(8)[None] < 8)[0, 0] == pytest.approx(5 / 127)
    assert score_cache.scales_of(keys, jnp.arange(8)[None] < 3)[0, 0] == pytest.approx(500 / 127)  # there are no others
    moved = jnp.pad(keys, ((0, 0),) * 3 + ((5, 0),))  # the row begins at column 5
    assert score_cache.scales_of(moved, jnp.arange(13)[None] >= 5)[0, 0] == pytest.approx(5 / 127)
    keys = jnp.zeros((1, 1, 2, 200)).at[..., 100:].set(jnp.asarray([1.0, 0.0])[:, None]).at[0, 0, 0, 150].set(9.0)
    assert score_cache.scales_of(keys, jnp.ones((1, 200), bool))[0, 0] == pytest.approx(9 / 127)  # an outlier counts


def test_a_short_prompt_leaves_room_for_what_comes():
    """Of normal keys of 16 elements, the scale of 1 ... 8 tokens must saturate few of 1,000 later ones."""
    keys = jax.random.normal(jax.random.key(0), (64, 2, 16, 1024))
    for held in (5, 6, 8, 12):
        scales = score_cache.scales_of(keys, jnp.broadcast_to(jnp.arange(1024)[None] < held, (64, 1024)))
        beyond = jnp.abs(keys[..., held:]) > 127 * scales[..., None, None]
        assert float(jnp.mean(beyond)) < 5e-4, held


@pytest.mark.slow
def test_decoding_chooses_by_the_stored_keys(model, predictor, tokens, states):
    """The same step on int8 keys and on the floats they stand for."""
    stored = states["int8"]
    floats = ScoreCache(score_cache.restored(stored.scores.k_imp, stored.scores.scales), stored.scores.trunk)
    step = jax.jit(partial(decode_step, predictor=predictor, selection=SELECTION, details=True))
    logits, state, found = step(model, tokens[:, 0], stored)
    same, _, expected = step(model, tokens[:, 0], dataclasses.replace(stored, scores=floats))
    np.testing.assert_array_equal(found.chosen, expected.chosen)
    np.testing.assert_allclose(logits, same, atol=1e-5)
    np.testing.assert_allclose(found.scores[1:], expected.scores[1:], atol=1e-5)
    assert state.scores.k_imp.dtype == jnp.int8


@pytest.mark.slow
def test_generation_and_evaluation_take_it(model, predictor, tokens):
    base = Base("random", model, None, "f")
    prompts = [tokens[0].tolist(), tokens[1, :23].tolist()]
    settings = dict(predictor=predictor, selection=SELECTION, max_new_tokens=12, score_dtype="int8")
    together = butler_jax.generate(base, prompts, **settings)
    alone = butler_jax.generate(base, prompts[1], capacity=64, **settings)
    assert together.tokens[1] == alone.tokens[0]
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": jnp.arange(40)[None] + 0 * tokens}
    selection = SelectionConfig(sinks=2, recent=3)
    look = partial(measure_recall, model, predictor, [batch], [make_policy("tokenbutler")], [0.5], selection=selection)
    exact, whole = (look(score_dtype=d).mass["tokenbutler"][0.5] for d in (None, "int8"))
    assert whole == pytest.approx(exact, abs=5e-3) and whole != exact


def test_another_dtype_is_refused(model, predictor, tokens):
    with pytest.raises(ValueError, match="score_dtype must be 'int8' or None, got 'int4'"):
        prefill(model, tokens, LENGTHS, capacity=64, predictor=predictor, score_dtype="int4")
