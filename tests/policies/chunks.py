"""The sizes of the chunk that the tests of policies score, and the numpy form of a softmax."""

from __future__ import annotations

import numpy as np

B, K, G, C, D, S = 2, 2, 3, 4, 8, 12


def softmax(x, allowed):
    weights = np.where(allowed, np.exp(np.float64(x)), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
