"""Errors in the residual stream, against the stream itself in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model import embed, run_layers
from butler_jax.policies import OracleResidual, TokenButler, make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import map_chunks, simulate
from tests.tiny_models import BASE, make_batch, make_model


@pytest.fixture(scope="module", params=["pre", "sandwich"])
def seen(request):
    """The chunks of layer 1 of a random model on two documents, and what its values go through into the stream."""
    model, batch = make_model(dataclasses.replace(BASE, norms=request.param)), make_batch([[20, 12]], 32)
    scale = 1.0
    if request.param == "sandwich":
        norms = jax.random.uniform(jax.random.key(1), (BASE.layers, BASE.width), minval=0.5, maxval=2.0)
        model.layers.attention_output_norm[...] = norms
        scale = np.asarray(norms[1], np.float64)
    found = {}

    def mixer(carry, view):
        def watch(chunk):
            return {name: getattr(chunk, name) for name in ("logits", "allowed", "v", "x")} | {
                error: OracleResidual(error=error).scores(chunk) for error in ("weight", "value", "centred", "critical")
            }

        values = map_chunks(watch, view, None, jnp.asarray(batch["segments"]), None)
        return jnp.zeros_like(view.q), carry, values

    x = embed(model, jnp.asarray(batch["tokens"]))
    stacked = jax.jit(lambda: run_layers(model, x, jnp.asarray(batch["positions"]), mixer, None)[2])()
    found = {name: np.asarray(value[1, 0], np.float64) for name, value in stacked.items()}
    return found, np.asarray(model.layers.o[...][1], np.float64) * scale


@pytest.mark.parametrize("error", ["weight", "value", "centred"])
def test_scores_are_logarithms_of_what_not_reading_a_token_changes(seen, error):
    arrays, output = seen
    allowed = arrays["allowed"].astype(bool)[:, None, None]
    weights = np.where(allowed, np.exp(arrays["logits"]), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    batch, kv_heads, group, rows, keys = weights.shape
    values = np.broadcast_to(arrays["v"][:, :, None, None], (batch, kv_heads, group, rows, keys, 16))
    if error == "centred":
        values = values - np.einsum("bkgcs,bksd->bkgcd", weights, arrays["v"])[..., None, :]
    in_stream = np.einsum("bkgcsd,kgde->bkgcse", values, output.reshape(kv_heads, group, 16, -1))
    sizes = 1.0 if error == "weight" else np.linalg.norm(in_stream, axis=-1)
    wanted = weights * sizes / np.linalg.norm(arrays["x"], axis=-1)[:, None, None, :, None]
    inside = np.broadcast_to(allowed, wanted.shape)
    # A centred norm is a root of a difference: what cancels is 8 roundings of the square of both norms' sum.
    own = np.einsum("bksd,kgde->bkgse", arrays["v"], output.reshape(kv_heads, group, 16, -1))
    mean = np.linalg.norm(np.einsum("bkgcs,bkgse->bkgce", weights, own), axis=-1)
    rounding = (8 * 2.0**-24) ** 0.5 * weights * (np.linalg.norm(own, axis=-1)[:, :, :, None] + mean[..., None])
    rounding = rounding / np.linalg.norm(arrays["x"], axis=-1)[:, None, None, :, None] * (error == "centred")
    assert (np.abs(np.exp(arrays[error]) - wanted) <= 1e-5 * wanted + rounding)[inside].all()


def test_the_critical_score_is_the_weight_times_the_mean_l1_norm(seen):
    arrays, output = seen
    allowed = arrays["allowed"].astype(bool)[:, None, None]
    weights = np.where(allowed, np.exp(arrays["logits"]), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    group = weights.shape[2]
    found, stream = np.exp(arrays["critical"]), np.linalg.norm(arrays["x"], axis=-1)
    for b, k, g, row, key in np.argwhere(np.broadcast_to(allowed, weights.shape)):
        norms = [np.abs(arrays["v"][b, k, key] @ output[k * group + head]).sum() for head in range(group)]
        wanted = (weights[b, k, g, row, key] + 1e-4) * np.mean(norms) / stream[b, row]
        np.testing.assert_allclose(found[b, k, g, row, key], wanted, rtol=2e-5)  # float32 logits of size 10


def test_dropping_a_token_changes_the_stream_by_the_centred_error(seen):
    """The definition itself: the attention output without one token, after renormalisation."""
    arrays, output = seen
    head, row, key = 1, 15, 7
    logits, values = arrays["logits"][0, 0, head, row, : row + 1], arrays["v"][0, 0, : row + 1]
    weights = np.exp(logits) / np.exp(logits).sum()
    without = np.delete(weights, key) / (1 - weights[key])
    change = (np.delete(values, key, axis=0).T @ without - values.T @ weights) @ output[head]
    wanted = np.linalg.norm(change) / np.linalg.norm(arrays["x"][0, row]) * (1 - weights[key])
    np.testing.assert_allclose(np.exp(arrays["centred"][0, 0, head, row, key]), wanted, rtol=1e-4)


def test_a_group_counts_by_its_largest_error_or_by_all():
    scores = jnp.log(jnp.asarray([3.0, 4.0]))[None, None, :, None, None]
    pooled = [
        float(jnp.exp(OracleResidual(pooling=p).pool(scores, None)[0, 0, 0, 0])) for p in ("maximum", "root_sum_square")
    ]
    np.testing.assert_allclose(pooled, [4.0, 5.0], rtol=1e-6)


def test_scores_without_a_common_unit_are_not_shared_between_heads():
    for allocation in ("per_layer", "tolerance"):
        selection = SelectionConfig(allocation=allocation)
        with pytest.raises(ValueError, match=f"no common unit for all heads, which the allocation {allocation} needs"):
            make_policy("quest").selection(selection)
        assert make_policy("oracle_residual").selection(selection) is selection


def test_values_do_not_count_twice():
    model = make_model()
    config = PredictorConfig(rank=8, target="centred", offset="share")
    with pytest.raises(ValueError, match="counts values already: leave out error"):
        TokenButler(error="value").for_predictor(make_predictor(model.config, config))


def test_a_tolerance_of_nothing_reads_everything():
    model, batch = make_model(), make_batch([[40]], 40)
    selection = SelectionConfig(budget=1.0, allocation="tolerance", tolerance=0.0)
    dense = simulate(model, batch, make_policy("dense"), SelectionConfig(budget=1.0))
    found = simulate(model, batch, OracleResidual(), selection)
    np.testing.assert_allclose(found.nll, dense.nll, atol=1e-5)
    np.testing.assert_array_equal(found.attended, 1.0)


def test_a_policy_of_a_name_takes_settings_after_it():
    assert make_policy("oracle_residual:error=value:pooling=root_sum_square") == OracleResidual(
        error="value", pooling="root_sum_square"
    )
    with pytest.raises(ValueError, match="has no pages"):
        make_policy("quest:pages=4")
