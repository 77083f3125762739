"""Calibration on empty batches."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from butler_jax.model.decoder import BaseModel
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from tests.edge_cases import BASE, text


@pytest.fixture(scope="module")
def model() -> BaseModel:
    return BaseModel(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def predictor():
    return make_predictor(BASE, PredictorConfig(rank=8, stride=2))


def test_calibration_passes_over_batches_of_padding(model, predictor):
    real, empty = text(30, 12, total=32), text(0, 0, total=32)
    found, wanted = predictor.initialise(model, [real, empty]), predictor.initialise(model, [real])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
