"""Attention of logits that are not finite, and of sliding windows beyond the length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.model.attention import causal_attention, masked_softmax
from tests.edge_cases import INF, NAN, normal


def test_weights_are_of_what_is_seen_whatever_the_logits_are():
    logits = jnp.asarray([[1.0, 1.0, 5.0], [-INF, -INF, 5.0], [-INF, 0.0, 5.0], [9.0, 9.0, 5.0], [NAN, 0.0, 5.0]])
    mask = jnp.asarray([[True, True, False]] * 3 + [[False] * 3] + [[True, True, False]])
    found = np.asarray(masked_softmax(logits, mask))
    np.testing.assert_array_equal(found[:4], [[0.5, 0.5, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    assert np.isnan(found[4, :2]).all()


def test_infinitely_unlikely_keys_weigh_nothing_and_the_gradient_is_finite():
    q, k, v = normal(0, 1, 9, 1, 4), normal(1, 1, 9, 1, 4), normal(2, 1, 9, 1, 4)
    q = q.at[..., 0].set(9.0)
    far = k.at[0, 3, 0].set(-1e35)
    rest = np.delete(np.arange(9), 3)
    out = np.asarray(causal_attention(q, far, v))[0, rest]
    np.testing.assert_allclose(out, causal_attention(q[:, rest], k[:, rest], v[:, rest])[0], atol=1e-6)
    gradient = jax.grad(lambda v: jnp.sum(causal_attention(q.at[0, 5].set(-1e10), 1e25 * jnp.abs(k), v) ** 2))(v)
    assert np.isfinite(gradient).all()


def test_a_window_beyond_the_length_is_no_window_and_one_token_sees_itself():
    q, k, v = normal(0, 2, 7, 4, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 8)
    np.testing.assert_array_equal(causal_attention(q, k, v, sliding_window=1000), causal_attention(q, k, v))
    one = causal_attention(q[:, :1], k[:, :1], v[:, :1])
    np.testing.assert_array_equal(one, np.repeat(v[:, :1], 2, axis=2))
