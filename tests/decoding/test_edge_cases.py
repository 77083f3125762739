"""Decoding from empty rows, and with scores or logits that are not finite."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding.cache import DecodeState, empty_store
from butler_jax.decoding.cached_attention import attend_cached
from butler_jax.decoding.prefill_pass import prefill
from butler_jax.decoding.score_cache import ScoreCache
from butler_jax.decoding.scoring import empty_scores
from butler_jax.decoding.step import decode_step
from butler_jax.model.attention import causal_attention
from butler_jax.model.decoder import BaseModel, forward
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import simulate
from tests.edge_cases import BASE, NAN, normal, text
from tests.marked import long


@pytest.fixture(scope="module")
def model() -> BaseModel:
    return BaseModel(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def predictor():
    return make_predictor(BASE, PredictorConfig(rank=8, stride=2))


def test_dense_attention_of_logits_that_are_not_finite():
    """Row 5 sees nothing above -1e30, row 8 has +inf, row 11 is NaN: each in one head of two."""
    q, k, v = normal(0, 1, 20, 2, 4), jnp.abs(normal(1, 1, 20, 1, 4)) + 0.1, normal(2, 1, 20, 1, 4)
    strange = q.at[0, 5, 0].set(-1e34).at[0, 8, 1].set(3e38).at[0, 11, 0].set(NAN)
    out, lse = map(np.asarray, jax.jit(partial(causal_attention, return_lse=True))(strange, 9 * k, v))
    wanted = np.array(jax.jit(causal_attention)(q, 9 * k, v))
    assert lse[0, 5, 0] == np.float32(-1e30)
    wanted[0, 5, 0], wanted[0, 8, 1], wanted[0, 11, 0] = 0, NAN, NAN
    np.testing.assert_array_equal(out, wanted)
    # One token at a time over a cache, the same rows; what the cache has no tokens for is huge.
    cache = tuple(jnp.full((1, 1, 1, 24, 4), 1e30).at[0, 0, 0, :20].set(a[0, :, 0]) for a in (9 * k, v))
    step = jax.jit(lambda q, k, v, t: attend_cached(q, k, v, *cache, 0, t))
    for t in (0, 5, 7, 8, 11):
        one = step(strange[:, t : t + 1], 9 * k[:, t : t + 1], v[:, t : t + 1], jnp.asarray([t]))
        np.testing.assert_allclose(one[0, 0], wanted[0, t], atol=1e-6)  # the same sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", long("reference")])
def test_a_predictor_that_is_no_number_chooses_the_earliest(model, predictor, implementation):
    broken = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    selection = SelectionConfig(budget=10, sinks=2, recent=3)
    tokens = text(24, total=24)["tokens"]
    fill = jax.jit(partial(prefill, model, capacity=32, selection=selection))
    step = jax.jit(partial(decode_step, model, selection=selection, details=True, implementation=implementation))
    _, state = fill(tokens, jnp.asarray([24]), predictor=predictor)
    broken.heads.query[...] = jnp.full_like(broken.heads.query[...], NAN)
    logits, _, found = step(jnp.asarray([5]), state, predictor=broken)
    assert np.flatnonzero(found.chosen[1, 0, 0]).tolist() == [0, 1, 2, 3, 4, 5, 6, 22, 23, 24]
    assert np.isfinite(logits).all()
    batch = text(25, total=25) | {"tokens": jnp.concatenate([tokens, jnp.asarray([[5]])], axis=1)}
    found = simulate(model, batch, make_policy("tokenbutler"), selection, broken)
    assert np.asarray(found.greedy)[0, -1] == np.asarray(logits)[0].argmax()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", long("reference")])
@pytest.mark.parametrize("fields", [None, dict(), dict(unit=4, interval=2)], ids=["dense", "tokens", "pages"])
def test_a_row_that_holds_nothing_begins_with_the_token_given(model, predictor, implementation, fields):
    """A cache of one token's room, and beside a longer row: logits of a pass over that token alone."""
    selection = None if fields is None else SelectionConfig(budget=0.5, sinks=2, recent=3, **fields)
    wanted = np.asarray(forward(model, jnp.asarray([[7], [9]])))[:, 0]
    options = dict(predictor=predictor, selection=selection, implementation=implementation)
    step = jax.jit(lambda tokens, state: decode_step(model, tokens, state, **options))
    fill = partial(prefill, model, predictor=predictor, selection=selection)
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 61, (2, 12)), jnp.int32)
    _, state = jax.jit(partial(fill, capacity=20))(tokens, jnp.asarray([0, 12]))  # known on the device alone
    logits, state, found = step(jnp.asarray([7, 9]), state)
    np.testing.assert_allclose(logits[0], wanted[0], atol=2e-5)  # float32 sums in another order
    assert np.asarray(state.lengths).tolist() == [1, 13] and (np.asarray(found.attended)[:, 0] == 1).all()
    if fields != dict(unit=4, interval=2):
        scores = empty_scores(predictor, model, 2, 1, jnp.float32)
        empty = DecodeState(empty_store(BASE, 2, 1, jnp.float32), scores, jnp.zeros(2, jnp.int32), jnp.int32(0))
        logits, state, _ = step(jnp.asarray([7, 9]), empty)
        np.testing.assert_allclose(logits, wanted, atol=2e-5)
        with pytest.raises(ValueError, match="the cache is full: a row holds 1 of 1 tokens"):
            decode_step(model, jnp.asarray([1, 1]), state, **options)


@pytest.mark.slow
def test_a_prompt_of_one_token_keeps_its_int8_keys(model, predictor):
    _, state = prefill(model, jnp.asarray([[7]]), jnp.asarray([1]), capacity=2, predictor=predictor, score_dtype="int8")
    assert isinstance(state.scores, ScoreCache) and (np.asarray(state.scores.scales)[1:] > 0).all()
