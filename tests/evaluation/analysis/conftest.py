"""The model, batch and predictor that the analyses are tested with."""

from __future__ import annotations

import pytest

from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from tests.tiny_models import BASE, make_batch, make_model


@pytest.fixture(scope="package")
def model():
    return make_model()


@pytest.fixture(scope="package")
def batch():
    """Two rows of one document each, of 60 and 50 tokens."""
    return make_batch([[60], [50]], 64)


@pytest.fixture(scope="package")
def predictor():
    return make_predictor(BASE, PredictorConfig(kind="producer", rank=8, stride=2, hidden=24))
