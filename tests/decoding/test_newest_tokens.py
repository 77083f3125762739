"""Where the newest tokens stand, and what a sliding window leaves them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from butler_jax.decoding.newest_tokens import newest_of
from tests.decoding.letters import BASE


def test_a_sliding_layer_sees_its_last_tokens_and_another_all():
    base = dataclasses.replace(BASE, sliding_window=4, sliding_layers=(True, False, True))
    newest = newest_of(base, jnp.asarray([2, 9]))
    np.testing.assert_array_equal(newest.total, [3, 10])
    np.testing.assert_array_equal(newest.first(jnp.int32(0)), [0, 6])
    np.testing.assert_array_equal(newest.first(jnp.int32(1)), [0, 0])
    assert newest_of(BASE, jnp.asarray([2, 9])).first(jnp.int32(0)) is None
