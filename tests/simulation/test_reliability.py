"""What a predictor predicts beside what is true, in bins by the first."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.policies import OracleResidual, TokenButler, make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.simulation import measure_recall
from butler_jax.simulation.chunks import sum_chunks
from butler_jax.simulation.reliability import BINS, LOWEST, PLACES, mean_reliability, sum_reliability
from tests.tiny_models import BASE, make_batch, make_model

LENGTH, SINKS, RECENT = 40, 4, 8


@pytest.fixture(scope="module")
def model():
    return make_model()


def of_served(model, target, factor):
    """The sums over the served layers of a predictor that knows the truth, times a factor."""
    batch = {name: jnp.asarray(array) for name, array in make_batch([[LENGTH]], LENGTH).items()}
    policy = TokenButler(offset="none" if target == "attention" else "self_normalised")
    predictor = SimpleNamespace(config=SimpleNamespace(target=target))

    def look(chunk):
        chunk = chunk._replace(sinks=SINKS, recent=RECENT)
        exact = chunk.logits if target == "attention" else OracleResidual(error=target).scores(chunk)
        chunk = chunk._replace(predicted=exact, offset=jnp.full((*exact.shape[:-1], 1), jnp.log(factor)))
        counted = jnp.broadcast_to(chunk.rows.own < LENGTH, (1, chunk.rows.own.shape[1]))
        return sum_reliability(policy, chunk.predicted, chunk, counted, predictor)

    found = jax.jit(lambda: sum_chunks(model, None, batch, look))()
    return np.asarray(found)[1:].sum(axis=(0, -1))


@pytest.mark.parametrize(("target", "factor"), [("attention", 1), ("centred", 1), ("centred", 3), ("weight", 3)])
def test_who_knows_the_truth_is_on_the_line(model, target, factor):
    keys, rows = of_served(model, target, factor)
    contested = [max(t + 1 - SINKS - RECENT, 0) for t in range(LENGTH)]
    heads = (BASE.layers - 1) * BASE.kv_heads
    assert keys[0].sum() == heads * sum(contested)
    assert rows[0].sum() == heads * sum(map(bool, contested))
    for _, predicted, true in (keys, rows):
        np.testing.assert_allclose(predicted, factor * true, rtol=1e-4)
    assert keys[1].sum() == pytest.approx(rows[1].sum(), rel=1e-4)
    for kind in mean_reliability(np.stack([keys, rows])):
        edges = 10.0 ** (LOWEST + np.arange(BINS + 1) / PLACES)
        held = [np.searchsorted(edges, value * (1 + 1e-5)) for value in kind["predicted"]]
        assert len(set(held)) == len(held) > 1  # each mean lies in a bin of its own


def test_recall_has_it_for_the_predictor_alone(model):
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    policies = [make_policy(name) for name in ("tokenbutler", "streaming", "h2o")]
    found = measure_recall(model, predictor, [make_batch([[60], [30]], 64)], policies, [0.5]).reliability
    assert list(found) == ["tokenbutler"]
    keys, rows = found["tokenbutler"]
    heads = (BASE.layers - 1) * BASE.kv_heads
    assert sum(rows["count"]) == 2 * heads  # of the rows that are ranked, every sixteenth one of at least 32 keys
    assert sum(keys["count"]) == heads * sum(t + 1 - SINKS - RECENT for t in (31, 47))
    assert all(np.isfinite(kind[name]).all() for kind in (keys, rows) for name in ("predicted", "true"))
