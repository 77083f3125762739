"""A simulated pass over rows of one token or none, and of budgets beyond the length."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from butler_jax.model.decoder import BaseModel, forward
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import measure_recall, simulate
from tests.edge_cases import BASE, text
from tests.marked import long


@pytest.fixture(scope="module")
def model() -> BaseModel:
    return BaseModel(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def predictor():
    return make_predictor(BASE, PredictorConfig(rank=8, stride=2))


def test_a_base_of_one_layer_is_dense():
    model = BaseModel(dataclasses.replace(BASE, layers=1), jax.random.key(0))
    found = simulate(
        model, text(9, 0, total=9), make_policy("streaming"), SelectionConfig(budget=0.25, sinks=1, recent=1)
    )
    assert np.isfinite(found.nll).all() and np.asarray(found.attended)[0].tolist() == [1.0] * 9


def test_logits_that_are_not_numbers_predict_no_token():
    broken = BaseModel(BASE, jax.random.key(0))
    broken.embedding[...] = broken.embedding[...] * np.nan
    dense, batch = make_policy("dense"), text(9, 0, total=9)
    found = simulate(broken, batch, dense, None, reference=simulate(broken, batch, dense, None).stream)
    assert (np.asarray(found.greedy) == -1).all() and not np.asarray(found.agrees).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenbutler", long("oracle"), long("streaming"), "h2o"])
def test_a_pass_over_one_token_or_none_is_dense(model, predictor, name):
    policy, selection = make_policy(name), SelectionConfig(budget=0.25)
    batch = text(1, 0, total=1)
    found = simulate(model, batch, policy, selection, predictor)
    dense = np.asarray(forward(model, batch["tokens"], segments=batch["segments"]))
    assert np.asarray(found.greedy)[0, 0] == dense[0, 0].argmax() and np.asarray(found.attended)[0, 0] == 1
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(found)) and not np.asarray(found.nll).any()


@pytest.mark.slow
def test_an_empty_row_changes_nothing_for_the_others(model, predictor):
    policy, selection = make_policy("tokenbutler"), SelectionConfig(budget=0.4, sinks=2, recent=3)
    both, alone = text(30, 0, total=40), text(30, total=40)
    found, wanted = (simulate(model, b, policy, selection, predictor) for b in (both, alone))
    np.testing.assert_allclose(found.nll[:1], wanted.nll, atol=1e-5)  # float32 sums of another batch size
    assert not np.asarray(found.nll)[1].any() and np.isfinite(found.stream).all()
    recalls = [measure_recall(model, predictor, [b], [policy], [0.5], selection=selection) for b in (both, alone)]
    masses = [recall.mass["tokenbutler"][0.5] for recall in recalls]
    assert masses[0].value == pytest.approx(masses[1].value, abs=1e-6) and masses[0].n == masses[1].n


@pytest.mark.slow
def test_a_budget_or_sliding_window_beyond_the_length_is_dense(model, predictor):
    batch, policy = text(20, 7, total=20), make_policy("tokenbutler")
    wanted = np.asarray(simulate(model, batch, make_policy("dense"), SelectionConfig()).nll)
    for budget in (10_000, 1.0):
        found = simulate(model, batch, policy, SelectionConfig(budget=budget, sinks=40, recent=50), predictor)
        np.testing.assert_allclose(found.nll, wanted, atol=1e-5)  # float32 sums in another order
    wide = BaseModel(dataclasses.replace(BASE, sliding_window=1000), jax.random.key(0))
    found = simulate(wide, batch, policy, SelectionConfig(budget=1.0), predictor)
    np.testing.assert_allclose(found.nll, wanted, atol=1e-5)
