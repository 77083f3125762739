"""Scores are pooled over the query heads of a group."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.policies import make_policy
from tests.policies.chunks import B, C, softmax


@pytest.mark.parametrize(("name", "field"), [("oracle", "logits"), ("tokenbutler", "predicted")])
def test_pooled_score_orders_as_largest_weight_of_group(chunk, name, field):
    keys = np.array(chunk.allowed)
    if name == "tokenbutler":  # compares heads by what they give to keys that are not read anyway
        for batch, row in np.ndindex(B, C):
            own, start = int(chunk.rows.own[batch, row]), int(chunk.rows.start[batch, row])
            keys[batch, row, start : start + 2] = keys[batch, row, own - 2 : own + 1] = False
    keys = keys[:, None, None]
    wanted = softmax(np.asarray(getattr(chunk, field)), keys).max(axis=2)
    scores = np.asarray(make_policy(name)(chunk), np.float64)
    inside = np.broadcast_to(keys[:, 0], wanted.shape)
    # float32 logits of size 10 carry an error of 1e-6, and so do their exponentials in relation
    np.testing.assert_allclose(np.exp(scores[inside]), wanted[inside], rtol=2e-5)
