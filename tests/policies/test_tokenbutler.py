"""The policy of the predictor, in its other pooling."""

from __future__ import annotations

import numpy as np

from butler_jax.policies import make_policy


def test_plain_maximum_takes_no_normaliser_off(chunk):
    scores = make_policy("tokenbutler", pooling="maximum")(chunk)
    np.testing.assert_array_equal(scores, np.asarray(chunk.predicted).max(axis=2))
