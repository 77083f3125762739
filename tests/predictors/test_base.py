"""Every predictor's schedule over the layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.predictors.base import Predictor, schedule
from butler_jax.predictors.config import PredictorConfig
from tests.tiny_models import BASE


def predictor_of(stride, **sizes):
    return Predictor(dataclasses.replace(BASE, **sizes), PredictorConfig(stride=stride))


@pytest.mark.parametrize("layers", [2, 3, 5, 9, 12])
@pytest.mark.parametrize("stride", [1, 2, 4, 7])
def test_schedule_equals_a_walk_by_hand(layers, stride):
    stride = min(stride, layers - 1)
    predictor = predictor_of(stride, layers=layers)
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


def test_blocks_begin_at_a_served_layer_and_span_the_stride():
    seeing = {3, 4, 6, 9, 17}
    base = dict(layers=18, sliding_window=8, sliding_layers=tuple(layer not in seeing for layer in range(18)))
    found = {stride: [tuple(block) for block in predictor_of(stride, **base).blocks] for stride in (1, 4, 17)}
    assert found[1] == [(layer - 1, (layer,)) for layer in sorted(seeing)]
    assert found[4] == [(2, (3, 4, 6)), (8, (9,)), (16, (17,))]
    assert found[17] == [(2, (3, 4, 6, 9, 17))]
    places = jax.tree.map(np.asarray, schedule(predictor_of(4, **base), jnp.arange(18)))
    assert np.flatnonzero(places.serves).tolist() == sorted(seeing)
    assert places.head[sorted(seeing)].tolist() == [0, 1, 2, 3, 4]
    assert places.place[sorted(seeing)].tolist() == [0, 1, 2, 0, 0]
    for flags, layers in ((places.starts, [3, 9, 17]), (places.ends, [6, 9, 17]), (places.captures, [2, 8, 16])):
        assert np.flatnonzero(flags).tolist() == layers
