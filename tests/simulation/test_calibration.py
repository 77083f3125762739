"""Thresholds that are calibrated reach their mean, and no row reads more than the budget."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel
from butler_jax.policies import TokenButler, make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import calibrate_thresholds, calibrate_tolerance, simulate
from pallas_kernels import from_image, ordered_image
from tests.marked import long, slow

MEANS = (1 / 8, np.float32(0.125), "1/8")

BASE = BaseConfig(
    family="llama", vocab_size=61, width=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=16, context=256
)


@pytest.fixture(scope="module")
def model():
    model = BaseModel(BASE, jax.random.key(0))
    model.layers.q[...] = model.layers.q[...] * 4
    return model


def batch_of(rows=2, length=128):
    tokens = np.random.default_rng(0).integers(1, 61, (rows, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 100:] = 0
    return {"tokens": tokens, "segments": segments, "positions": np.arange(length, dtype=np.int32)[None] + 0 * tokens}


@pytest.mark.parametrize(("mean", "unit"), [(0.3, 1), pytest.param(20, 4, marks=pytest.mark.slow)])
def test_mean_of_what_rows_read_is_reached(model, mean, unit):
    batch, most = batch_of(), SelectionConfig(budget=0.6 if unit == 1 else 60, sinks=2, recent=3, unit=unit)
    selection = calibrate_thresholds(model, None, [batch], most, mean, policy=make_policy("oracle"))
    assert selection.budget == most.budget and np.isneginf(selection.threshold[0]).all()
    # One sparse layer after the dense one: what it chooses changes nothing of what it chooses by.
    found = np.asarray(simulate(model, batch, make_policy("oracle"), selection).attended)
    counts = np.arange(1, 129)[None]
    real = batch["segments"] > 0
    read = mean_read(found, real, mean)
    # The next smaller threshold would read more than the mean; at a precision of 2**-7 few keys lie between the two.
    assert 0.9 * mean <= read <= mean * 1.001
    tokens = (found * counts)[real]
    assert np.ptp(tokens[-60:]) > 4  # rows of nearly one length read as much as they need
    limit = np.broadcast_to(np.maximum(np.ceil(0.6 * counts), 5) if unit == 1 else 60, real.shape)
    assert (tokens <= np.minimum(limit, counts)[real] + 1e-3).all()


def test_thresholds_that_all_of_the_budget_does_not_reach_read_all_of_it(model):
    most = SelectionConfig(budget=64, sinks=2, recent=3)
    found = calibrate_thresholds(model, None, [batch_of()], most, 60, policy=make_policy("oracle"))
    assert np.isneginf(found.threshold).all()


def test_a_tolerance_of_tokens_counts_what_a_sliding_window_holds():
    base = dataclasses.replace(BASE, family="mistral", sliding_window=32)
    model = BaseModel(base, jax.random.key(0))
    batch, policy = batch_of(), make_policy("oracle_residual")
    most = SelectionConfig(budget=1.0, sinks=2, recent=3)
    (found,) = calibrate_tolerance(model, None, [batch], most, [12], policy=policy, rows=None)
    share = np.asarray(simulate(model, batch, policy, found).attended)
    read = (share * np.minimum(np.arange(1, 129), 32))[batch["segments"] > 0]
    assert read.mean() == pytest.approx(12, rel=0.05)


def mean_read(share, counted, mean):
    """The share of all keys that the counted rows read, or with a number as mean, how many keys a row reads."""
    held = np.broadcast_to(np.arange(1, share.shape[1] + 1), share.shape)[counted]
    return np.sum(share[counted] * held) / (held.sum() if isinstance(mean, float) else counted.sum())


@pytest.mark.slow
@pytest.mark.parametrize(("prompt_tokens", "unit"), [long(0, 1), (40, 1), (40, 4)])
def test_one_tolerance_reaches_means_over_all_heads(model, prompt_tokens, unit):
    batch, policy = batch_of(), make_policy("oracle_residual")
    most = SelectionConfig(budget=1.0, sinks=2, recent=3, unit=unit)
    means = [0.25, 0.5, 20]
    found = calibrate_tolerance(
        model, None, [batch], most, means, policy=policy, prompt_tokens=prompt_tokens, rows=None
    )
    prompts = np.full(2, prompt_tokens, np.int32)
    counted = (batch["segments"] > 0) & (batch["positions"] >= prompt_tokens)
    for mean, selection in zip(means, found, strict=True):
        share = np.asarray(simulate(model, batch, policy, selection, prompts=prompts).attended)
        np.testing.assert_allclose(mean_read(share, counted, mean), mean, rtol=0.01)
        np.testing.assert_array_equal(share[batch["positions"] < prompt_tokens], 1.0)
    tolerances = [selection.tolerance for selection in found]
    assert tolerances[0] > tolerances[1]


def test_a_tolerance_counts_short_rows_and_the_most_that_a_head_may_read(model):
    batch, policy = batch_of(), make_policy("oracle_residual")
    most = SelectionConfig(budget=0.4, sinks=2, recent=3, min_context=60)
    (found,) = calibrate_tolerance(model, None, [batch], most, [0.35], policy=policy, rows=None, corrections=0)
    share, counted = np.asarray(simulate(model, batch, policy, found).attended), batch["segments"] > 0
    assert (share[counted & (batch["positions"] < 60)] == 1).all()
    assert mean_read(share, counted, 0.35) == pytest.approx(0.35, rel=0.03)


@pytest.mark.parametrize(("name", "means"), [("oracle", [0.3]), slow("quest:page=4", [0.3, 30])])
def test_one_p_reaches_means_over_all_heads(model, name, means):
    batch, policy = batch_of(), make_policy(name)
    most = SelectionConfig(budget=1.0, sinks=2, recent=3, allocation="top_p")
    how = dict(policy=policy, prompt_tokens=40, rows=None, corrections=0)
    found = calibrate_tolerance(model, None, [batch], most, means, **how)
    counted = (batch["segments"] > 0) & (batch["positions"] >= 40)
    for mean, selection in zip(means, found, strict=True):
        assert selection.allocation == "top_p" and 0 < selection.tolerance < 1
        share = np.asarray(simulate(model, batch, policy, selection, prompts=np.full(2, 40, np.int32)).attended)
        np.testing.assert_allclose(mean_read(share, counted, mean), mean, rtol=0.03)
        assert np.ptp(share[counted]) > 0.05 * mean_read(share, counted, 0.5)


@pytest.mark.parametrize("target", ["centred", slow("attention")])
def test_the_default_policy_is_that_of_the_predictor(model, target):
    batch, most = batch_of(), SelectionConfig(budget=1.0, sinks=2, recent=3)
    predictor = make_predictor(BASE, PredictorConfig(rank=8, target=target))
    policy = TokenButler(error=None if target == "centred" else "value")
    expected, found = (
        calibrate_tolerance(model, predictor, [batch], most, [0.5], policy=one, corrections=0) for one in (policy, None)
    )
    assert found == expected


@pytest.mark.slow
def test_a_mean_below_sinks_and_recent_has_an_infinite_tolerance(model):
    most = SelectionConfig(budget=1.0, sinks=4, recent=8)
    (found,) = calibrate_tolerance(model, None, [batch_of()], most, [10], policy=make_policy("oracle_residual"))
    assert found.tolerance == np.inf


def test_bits_and_floats_are_one_order():
    values = jnp.asarray([-np.inf, -2.5, -1e-30, 0.0, 1e-30, 7.0, np.inf], jnp.float32)
    np.testing.assert_array_equal(from_image(ordered_image(values)), values)


def test_bad_means_are_clear_errors(model):
    most = SelectionConfig(budget=0.25)
    with pytest.raises(ValueError, match="must be below the most a row may read"):
        calibrate_thresholds(model, None, [batch_of()], most, 0.5, policy=make_policy("oracle"))
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_thresholds(model, None, [], most, 0.125)
    with pytest.raises(ValueError, match="above 0"):
        calibrate_thresholds(model, None, [batch_of()], most, 0)
    with pytest.raises(ValueError, match="needs a trained predictor"):
        calibrate_thresholds(model, None, [batch_of()], most, 0.125)
    with pytest.raises(ValueError, match="give at least one batch, and one mean"):
        calibrate_tolerance(model, None, [batch_of()], most, [], policy=make_policy("oracle_residual"))
    with pytest.raises(ValueError, match=r"a mean budget of 0\.5 is above the most a row may read, 0\.25"):
        calibrate_tolerance(model, None, [batch_of()], most, [0.5], policy="oracle_residual")
    with pytest.raises(ValueError, match="the policy dense has no scores to set a tolerance on"):
        calibrate_tolerance(model, None, [batch_of()], most, [0.1], policy="dense")
    shared = SelectionConfig(budget=0.25, allocation="per_layer")
    with pytest.raises(ValueError, match="thresholds go with the allocation per_head, the allocation is per_layer"):
        calibrate_thresholds(model, None, [batch_of()], shared, 0.125, policy=make_policy("oracle_residual"))
    with pytest.raises(ValueError, match="a tolerance is found without neighbours"):
        calibrate_tolerance(
            model, None, [batch_of()], SelectionConfig(neighbours=True), [0.1], policy="oracle_residual"
        )
    with pytest.raises(ValueError, match="rows must be a whole number of at least 1, got -5"):
        calibrate_tolerance(model, None, [batch_of()], most, [0.1], policy=make_policy("oracle_residual"), rows=-5)
    numbers = [calibrate_thresholds(model, None, [batch_of()], most, n, policy=make_policy("oracle")) for n in MEANS]
    assert numbers[0] == numbers[1] == numbers[2]


@pytest.mark.slow
def test_layers_that_are_not_served_have_no_threshold():
    slides = dict(layers=4, sliding_window=16, sliding_layers=(True, False, True, False))
    model = BaseModel(dataclasses.replace(BASE, **slides), jax.random.key(0))
    batch, selection = batch_of(), SelectionConfig(budget=0.6, sinks=2, recent=3)
    found = calibrate_thresholds(model, None, [batch], selection, 0.3, policy=make_policy("oracle"))
    assert np.isneginf(found.threshold).all(axis=1).tolist() == [True, False, True, False]
    real = batch["segments"] > 0
    share = np.asarray(simulate(model, batch, make_policy("oracle"), found).attended)
    assert mean_read(share, real, 0.3) == pytest.approx(
        0.3, rel=0.1
    )  # later layers see sparse streams, thresholds were set on dense ones
