"""The small model of the tests of decoding, and its predictor."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import jax
import pytest

from butler_jax.model import BaseModel
from butler_jax.predictors import PredictorConfig, make_predictor
from tests.decoding.letters import BASE, Letters


@pytest.fixture(scope="session")
def base():
    model = BaseModel(BASE, jax.random.key(1))
    model.layers.q[...] = model.layers.q[...] * 4
    return SimpleNamespace(
        name="letters", model=model, tokenizer=Letters(), config=BASE, fingerprint="f", generation={}
    )


@pytest.fixture(scope="session")
def predictor():
    return make_predictor(BASE, PredictorConfig(rank=8, stride=2))


@pytest.fixture
def few_optimisations() -> Iterator[None]:
    """For tests that compile a program for each case and run it once; slow tests of models run optimised ones."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
