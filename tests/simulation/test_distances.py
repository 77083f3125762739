"""Attention weight and reads by distance against sums in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.policies import make_policy
from butler_jax.simulation import measure_recall
from butler_jax.simulation.distances import count_bins, sum_by_distance
from tests.tiny_models import SCORES, make_batch, make_model, naive


@pytest.mark.parametrize("first", [0, 16])
def test_sums_are_those_of_every_distance(first):
    random = np.random.default_rng(0)
    columns, own = first + np.arange(24), np.array([[first + 3, first + 23], [first, first + 9]])
    values = random.uniform(size=(2, 3, 2, 24))
    distances = own[..., None] + 1 - columns  # [B, C, S]
    values = np.where((distances > 0)[:, None], values, 0)
    bins = count_bins(first + 24)
    expected = np.zeros((2, 3, 2, bins))
    for place in np.ndindex(values.shape):
        b, _, c, s = place
        if distances[b, c, s] > 0:
            expected[(*place[:3], int(np.log2(distances[b, c, s])))] += values[place]
    found = sum_by_distance(jnp.asarray(values), jnp.asarray(own)[:, None], jnp.asarray(columns), bins)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_distances_of_recall_are_those_of_the_dense_weights():
    model, batch = make_model(), make_batch([[60]], 64)
    found = measure_recall(model, None, [batch], [make_policy("oracle"), make_policy("h2o")], [0.5, 0.25])
    assert list(found.distances) == ["oracle"]  # policies that evict have none
    _, _, dense = naive(model, batch["tokens"][0, :60], SCORES["oracle"], 1.0)
    true = np.zeros(7)
    for layer in (1, 2):
        for (_, t), weights in dense[layer].items():
            keys = np.arange(4, max(t - 7, 4))  # neither sinks nor recent
            np.add.at(true, np.log2(t + 1 - keys).astype(int), weights[keys] / (2 * 4 * 60))
    for budget, one in found.distances["oracle"].items():
        np.testing.assert_allclose(one["true"], true, atol=2e-5)
        lacking = 1 - found.mass["oracle"][budget].value
        assert sum(one["true"]) - sum(one["recalled"]) == pytest.approx(lacking, abs=2e-5)
        assert sum(one["read"]) == pytest.approx(1, abs=1e-5)
        assert (np.array(one["recalled"]) <= np.array(one["true"]) + 1e-5).all()
