"""Drawing tokens: against the definitions written out in numpy, and row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding.config import SamplingConfig
from butler_jax.decoding.sampling import Draws, allowed_logits, draw, draw_next, penalise

LOGITS = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 2


def draws_of(**fields):
    return Draws.of(SamplingConfig(**fields))


def kept(logits, **fields):
    return [
        set(np.flatnonzero(row > -np.inf))
        for row in np.asarray(allowed_logits(jnp.asarray(logits), draws_of(**fields)))
    ]


@pytest.mark.parametrize(("k", "p"), [(5, 1.0), (None, 0.7), (7, 0.5), (50, 1.0), (1, 0.3), (None, 0.01), (80, 0.9)])
def test_top_k_and_top_p_keep_the_fewest_likeliest(k, p):
    for row, found in zip(LOGITS, kept(LOGITS, temperature=0.7, top_k=k, top_p=p), strict=True):
        order = np.argsort(-row, kind="stable")[: k or len(row)]
        weights = np.exp(row[order].astype(np.float64) / 0.7)
        reached = np.cumsum(weights / weights.sum())
        wanted = order[: int(np.searchsorted(reached, p - 1e-9)) + 1] if p < 1 else order
        assert found == set(wanted)


def test_temperature_divides_and_zero_is_greedy():
    # float32 division
    half = draws_of(temperature=0.5)
    below = LOGITS - LOGITS.max(-1, keepdims=True)
    np.testing.assert_allclose(allowed_logits(jnp.asarray(LOGITS), half), below * 2, rtol=1e-6)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    tiny = draws_of(temperature=1e-38)
    np.testing.assert_array_equal(draw(jnp.asarray(LOGITS), keys, jnp.asarray(0), tiny), LOGITS.argmax(-1))
    np.testing.assert_array_equal(draw(jnp.asarray(LOGITS), keys, jnp.asarray(0), draws_of()), LOGITS.argmax(-1))


def test_repetition_penalty_weakens_only_what_was_seen():
    seen = np.zeros(LOGITS.shape, bool)
    seen[:, ::3] = True
    wanted = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.3, LOGITS * 1.3), LOGITS)
    np.testing.assert_allclose(penalise(jnp.asarray(LOGITS), jnp.asarray(seen), 1.3), wanted, rtol=1e-6)


def test_a_rows_draws_do_not_depend_on_its_batch():
    sampling = draws_of(temperature=1.0, top_p=0.95)
    keys = jax.vmap(jax.random.key)(jnp.asarray([7, 8, 9, 10], jnp.uint32))
    for step in range(3):
        together = draw(jnp.asarray(LOGITS), keys, jnp.asarray(step), sampling)
        for b in range(4):
            alone = draw(jnp.asarray(LOGITS[b : b + 1]), keys[b : b + 1], jnp.asarray(step), sampling)
            assert int(alone[0]) == int(together[b])


def test_every_step_draws_anew():
    keys, flat = jax.vmap(jax.random.key)(jnp.arange(64)), jnp.zeros((64, 1000))
    first, second = (draw(flat, keys, jnp.asarray(step), draws_of(temperature=1.0)) for step in (0, 1))
    assert np.mean(np.asarray(first) == np.asarray(second)) < 0.1


def test_a_token_that_is_drawn_counts_as_seen():
    keys, seen = jax.vmap(jax.random.key)(jnp.arange(4)), jnp.zeros(LOGITS.shape, bool)
    penalised = draws_of(repetition_penalty=1e6)
    tokens = []
    for step in range(3):
        token, seen = jax.jit(draw_next)(jnp.asarray(LOGITS), seen, keys, jnp.asarray(step), penalised)
        tokens.append(np.asarray(token))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), np.argsort(-LOGITS, axis=1)[:, :3])


def test_draws_follow_the_probabilities():
    logits = np.log(np.asarray([[0.5, 0.3, 0.2]], np.float32))
    keys = jax.vmap(jax.random.key)(jnp.arange(4000))
    sampling = draws_of(temperature=1.0)
    drawn = draw(jnp.broadcast_to(jnp.asarray(logits), (4000, 3)), keys, jnp.asarray(0), sampling)
    # standard error of a share of 4000 draws is below 0.008: five of them
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [0.5, 0.3, 0.2], atol=0.04)
