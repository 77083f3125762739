"""Scores that are drawn: their distribution, and what they depend on."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from butler_jax.policies import make_policy
from butler_jax.policies.random import mix
from butler_jax.selection.masks import Rows


def test_random_scores_are_uniform_and_differ_everywhere(chunk):
    big = 256
    own = jnp.arange(big, dtype=jnp.int32)[None]
    many = chunk._replace(rows=Rows(own, jnp.zeros_like(own)), columns=jnp.arange(big))
    many = many._replace(logits=jnp.zeros((1, *chunk.logits.shape[1:3], big, big)))
    scores = np.asarray(make_policy("random")(many))[0]
    assert scores.min() >= 0 and scores.max() < 1
    # 131,072 draws: the standard errors of the mean and of the deciles are below 1.5e-3
    assert abs(scores.mean() - 0.5) < 5e-3
    np.testing.assert_allclose(np.quantile(scores, [0.1, 0.9]), [0.1, 0.9], atol=8e-3)
    later = np.asarray(make_policy("random")(many._replace(layer=jnp.int32(4))))[0]
    other = np.asarray(make_policy("random", seed=1)(many))[0]
    pairs = [(scores[0], scores[1]), (scores, later), (scores, other), (scores[:, 1:], scores[:, :-1])]
    for a, b in pairs:
        # independent draws of at least 65,024 pairs correlate by less than 0.02 but for one time in 10**6
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_random_scores_do_not_depend_on_where_the_document_stands(chunk):
    scores = make_policy("random")(chunk)
    moved = chunk._replace(rows=Rows(chunk.rows.own + 7, chunk.rows.start + 7), columns=chunk.columns + 7)
    np.testing.assert_array_equal(scores, make_policy("random")(moved))


def test_hash_is_the_published_finaliser():
    def reference(h):
        h ^= h >> 16
        h = h * 0x85EBCA6B & 0xFFFFFFFF
        h ^= h >> 13
        h = h * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    values = [0, 1, 2, 0xDEADBEEF, 0xFFFFFFFF]
    np.testing.assert_array_equal(mix(jnp.asarray(values, jnp.uint32)), [reference(v) for v in values])
