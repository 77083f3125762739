"""The policies that rank by the true attention."""

from __future__ import annotations

import numpy as np

from butler_jax.policies import make_policy
from tests.policies.chunks import B, C, G, K, S


def test_oracle_per_head_keeps_every_query_head(chunk):
    scores = make_policy("oracle_head")(chunk)
    np.testing.assert_array_equal(scores, np.asarray(chunk.logits).reshape(B, K * G, C, S))
