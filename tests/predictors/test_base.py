"""Every predictor's schedule over the layers."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.predictors.base import schedule


@pytest.mark.parametrize("layers", [2, 3, 5, 9, 12])
@pytest.mark.parametrize("stride", [1, 2, 4, 7])
def test_schedule_equals_a_walk_by_hand(layers, stride):
    stride = min(stride, layers - 1)
    predictor = types.SimpleNamespace(stride=stride, base=types.SimpleNamespace(layers=layers))
    expected = {0: (False, None, None, False, False)}
    for number, producer in enumerate(range(0, layers - 1, stride)):
        block = list(range(producer + 1, min(producer + stride, layers - 1) + 1))
        for layer in block:
            expected[layer] = (True, number, layer - 1, layer == block[0], layer == block[-1])
    assert sorted(expected) == list(range(layers))
    places = jax.tree.map(np.asarray, schedule(predictor, jnp.arange(layers)))
    for layer, (serves, number, head, starts, ends) in expected.items():
        place = jax.tree.map(lambda a, i=layer: a[i], places)
        assert (place.serves, place.starts, place.ends) == (serves, starts, ends)
        if serves:
            assert (place.producer, place.head) == (number, head)
        if layer < layers - 1:  # nothing reads what the last layer captures
            assert place.captures == (layer in range(0, layers - 1, stride))
