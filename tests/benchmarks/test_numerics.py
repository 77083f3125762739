"""Errors of float32, bfloat16 and int8 against float64 are those of rounding, on activations of a trained model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import float64, numerics
from butler_jax import load_base
from butler_jax.evaluation.analysis.rows import batch_text
from butler_jax.training.losses.cross_entropy import attend_with_cross_entropy
from butler_jax.training.losses.squared_error import sum_squared_errors

README = Path(__file__).parent.parent.parent / "README.md"


@pytest.mark.long
@pytest.mark.slow
def test_errors_on_a_trained_model_are_those_of_rounding():
    found = numerics.measure("tiny", README.read_text(), 240, None, "tiny")
    # float32 keeps 24 bits: 6e-8 a rounding, some hundred of them added up as a random walk.
    for name, kinds in found["float32"]["errors"].items():
        for kind, error in kinds.items():
            assert error["rms"] < (3e-6 if kind != "whole" else 1e-5), (name, kind)
    # bfloat16 keeps 8: 2**-9 at most and 1.1e-3 on the mean for a result; scores and losses are float32.
    for name, kinds in found["bfloat16"]["errors"].items():
        exact = name in ("scores", "pooled", *numerics.LOSSES)
        if "arithmetic" in kinds:
            assert kinds["arithmetic"]["rms"] < (1e-6 if exact else 3e-3), name
            assert kinds["inputs"]["rms"] < 3e-2, name
        if "whole" in kinds:
            assert kinds["whole"]["rms"] < 3e-2, name
    # An element of int8 keys is off by at most half a step of 2/254 of the range, five times the spread or more.
    for name in ("scores", "pooled"):
        assert found["int8"]["errors"][name]["inputs"]["rms"] < 3e-2
    assert found["float32"]["choice"]["whole"]["0.25"]["equal_sets"] > 0.999
    for dtype, kind in (("bfloat16", "whole"), ("int8", "inputs")):
        for choice in found[dtype]["choice"][kind].values():
            assert choice["equal_tokens"] > 0.95 and abs(choice["mass_lost"]) < 3e-3, (dtype, choice)
    assert found["bfloat16"]["next_token"]["divergence_nats"] < 1e-3


def test_bfloat16_queries_are_scaled_after_their_products():
    """The root of a head dimension that is no power of four would round every query once more."""
    q, k, p, r = (jnp.asarray(np.random.default_rng(n).normal(size=(1, 64, 2, 8)), jnp.bfloat16) for n in range(4))
    _, found, _ = jax.jit(attend_with_cross_entropy)(q, k, k, p, r)
    exact = float64.distillation_loss("cross entropy", *(float64.wide(a) for a in (q, k, p, r)))[0]
    assert float(found) == pytest.approx(exact, rel=1e-6)  # float32 sums; with rounded queries it is 1e-4


def test_the_squared_error_asks_for_all_of_float32():
    """On accelerators products of float32 are rounded to fewer bits unless the program asks for more."""
    q, k, p, r = (jnp.ones((1, 200, 2, n)) for n in (8, 8, 4, 4))
    run = jax.jit(jax.value_and_grad(lambda p, r: sum_squared_errors(q, k, p, r)[0], (0, 1)))
    products = [line for line in run.lower(p, r).as_text().splitlines() if "dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.slow
def test_the_float64_form_is_the_model_within_float32():
    base = load_base("tiny")
    batch = batch_text(base, README.read_text(), 40)
    predictor = numerics.init_predictor(base, numerics.PredictorConfig(rank=16), batches=[batch])
    layers, logits = float64.run(base.model, predictor, batch["tokens"][0])
    found = jax.jit(numerics.forward)(base.model, jnp.asarray(batch["tokens"]))[0]
    np.testing.assert_allclose(found, logits, atol=1e-4)  # float32 logits of size 10
    assert len(layers) == base.config.layers and layers[0].q_imp is None and layers[1].q_imp.shape == (40, 8, 16)
    weights = numerics.mean_weights(layers[2])
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-12)
    choices = numerics.Choices(0.5, 40)
    mask = choices.exact(layers[3])
    assert (mask.sum(axis=-1) == choices.table[np.arange(40) + 1]).all()
    choices.add(mask, mask, weights)
    assert choices.row() == {
        "equal_sets": 1.0,
        "equal_tokens": 1.0,
        "mass_lost": 0.0,
        "mass_lost_where_different": 0.0,
        "mass_lost_at_worst": 0.0,
        "sets": 2 * int((np.ceil((np.arange(40) + 1) / 2) > 12).sum()),
    }
