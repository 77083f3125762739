"""The policy that reads the newest tokens."""

from __future__ import annotations

import numpy as np

from butler_jax.policies import make_policy
from tests.policies.chunks import B, C, K, S


def test_streaming_scores_by_recency(chunk):
    scores = np.asarray(make_policy("streaming")(chunk))
    assert scores.shape == (B, K, C, S) and (np.diff(scores, axis=-1) > 0).all()
