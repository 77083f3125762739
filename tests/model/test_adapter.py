"""A decoder of another project gives the numbers of BaseModel with the same weights, wherever a base is used."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import butler_jax
from butler_jax.model import AttentionInputs, LayerWeights, dense_mixer, embed, forward, run_layers
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import simulate
from butler_jax.training.objective import DistillationObjective
from butler_jax.training.stretching import stretch_positions
from butler_jax.weights import Base, adapt_model, fingerprint
from tests.marked import long, slow
from tests.own_decoder import OwnAdapter, OwnDecoder
from tests.tiny_models import BASE, make_batch, make_model

BATCH = make_batch([(60, 70), (100,)], 140)
SELECTION = SelectionConfig(budget=0.25, sinks=2, recent=4)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def adapter(model):
    return OwnAdapter(OwnDecoder(model), BASE)


@pytest.fixture(scope="module")
def base(adapter):
    return adapt_model(adapter, "own")


def test_logits_are_those_of_the_same_weights(model, base):
    tokens = jnp.asarray(BATCH["tokens"])
    expected, found = jax.jit(forward)(model, tokens), jax.jit(forward)(base.model, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)  # float32 sums in another order
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("target", [slow("attention"), long("value")])
def test_a_training_step_has_the_same_loss_and_gradient(model, base, target):
    config = PredictorConfig(rank=8, target=target, offset="none" if target == "attention" else "share")
    objective = DistillationObjective("cross_entropy", sinks=2, recent=4)
    batch = {name: jnp.asarray(array) for name, array in BATCH.items()}
    results = []
    for one in (Base("ours", model, None, fingerprint(model)), base):
        predictor = butler_jax.init_predictor(one, config, batches=[BATCH])
        results.append((nnx.state(predictor), *jax.jit(objective.differentiate)(predictor, one.model, batch)))
    flat = [jax.tree.leaves(result) for result in results]
    assert len(flat[0]) == len(flat[1])
    for expected, found in zip(*flat, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-12)


def test_layers_that_slide_keep_the_places_of_tokens_where_positions_skip():
    config = dataclasses.replace(BASE, sliding_window=24, sliding_layers=(False, True, False))
    ours = make_model(config)
    batch = stretch_positions(BATCH, 400)
    tokens, segments, positions, near = map(jnp.asarray, (*batch.values(), BATCH["positions"]))

    def stream(model, near):
        return run_layers(model, embed(model, tokens), positions, dense_mixer(config, segments), None, near=near)[0]

    expected, found = (stream(one, near) for one in (ours, OwnAdapter(OwnDecoder(ours), config)))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert float(jnp.abs(stream(ours, None) - expected).max()) > 1e-2


def test_a_simulation_reads_the_same_keys_and_predicts_the_same(model, base):
    predictor = butler_jax.init_predictor(base, PredictorConfig(rank=8), batches=[BATCH])
    policy = make_policy("tokenbutler")
    expected, found = (simulate(one, BATCH, policy, SELECTION, predictor) for one in (model, base.model))
    np.testing.assert_array_equal(found.shares, expected.shares)
    np.testing.assert_array_equal(found.greedy, expected.greedy)
    np.testing.assert_allclose(found.nll, expected.nll, atol=1e-4)
    assert float(jnp.mean(found.attended)) < 0.5


@pytest.mark.slow
def test_generation_gives_the_same_tokens_from_a_list_of_layers_and_from_stacked_ones(model, base):
    stacked = adapt_model(OwnAdapter(OwnDecoder(model), BASE, stacked=True), "stacked")
    predictor = butler_jax.init_predictor(base, PredictorConfig(rank=8), batches=[BATCH])
    how = dict(predictor=predictor, selection=SELECTION, max_new_tokens=12)
    bases = Base("ours", model, None, fingerprint(model)), base, stacked
    expected, *found = (butler_jax.generate(one, [list(range(1, 40)), list(range(7, 20))], **how) for one in bases)
    for one in found:
        assert one.tokens == expected.tokens
        assert one.attended == expected.attended


@pytest.mark.long  # a simulation, above, is what an evaluation is made of
@pytest.mark.slow
def test_an_evaluation_reports_the_same_numbers():
    tiny = butler_jax.load_base("tiny")
    base = adapt_model(OwnAdapter(OwnDecoder(tiny.model), tiny.config), "own", tiny.tokenizer)
    sizes = dict(tokens=256, context=128, budgets=(0.25,))
    config = butler_jax.EvalConfig(
        **sizes, policies=("dense", "tokenbutler"), tasks=("perplexity",), data="python_docs"
    )
    predictor = butler_jax.init_predictor(base, PredictorConfig(rank=8), batches=[BATCH])
    expected, found = (butler_jax.evaluate(one, predictor, config) for one in (tiny, base))
    assert len(found.rows) == len(expected.rows) > 5
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert all(one[name] == other[name] for name in ("metric", "policy", "budget"))
        assert one["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-6), one


def test_layers_of_different_structures_run_one_after_the_other(model):
    decoder = OwnDecoder(model)
    decoder.blocks[1].note = "another"  # a static attribute: scanned layers are all alike
    found = jax.jit(forward)(OwnAdapter(decoder, BASE), jnp.asarray(BATCH["tokens"]))
    np.testing.assert_allclose(found, jax.jit(forward)(model, jnp.asarray(BATCH["tokens"])), atol=2e-5)


def test_no_copy_of_the_weights_is_made(adapter, base):
    own = jax.tree.leaves(adapter.decoder)
    assert all(a is b for a, b in zip(own, jax.tree.leaves(base.model.decoder), strict=True))

    def count(carry, view):
        return view.q, carry, None

    x = jnp.zeros((1, 2, BASE.width))
    program = jax.jit(lambda model: run_layers(model, x, jnp.zeros((1, 2), jnp.int32), count, None)[0])
    memory = program.lower(adapter).compile().memory_analysis()
    layer = sum(a.nbytes for a in jax.tree.leaves(adapter.layers[0]))
    assert memory.temp_size_in_bytes < 2 * layer


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        (
            "embed",
            lambda self, tokens: self.decoder.table[tokens][..., 1:],
            r"embed\(tokens\) is of shape \(2, 3, 31\)",
        ),
        ("project", lambda self, layer, x, p: AttentionInputs(*[jnp.zeros((2, 3, 4, 16))] * 4), r"project.*\.k is of"),
        ("finish", lambda self, layer, x, mixed: x.astype(jnp.bfloat16), "finish.* is bfloat16"),
        ("logits", lambda self, x: x, r"logits\(x\) is of shape .* \[B, T, V\]"),
        ("weights", lambda self, layer: LayerWeights(layer.before[...], layer.q.kernel[...], None), "weights.*q is of"),
    ],
)
def test_a_shape_that_does_not_fit_the_config_is_named(adapter, method, wrong, said):
    broken = type("Broken", (OwnAdapter,), {method: wrong})(adapter.decoder, BASE)
    with pytest.raises(ValueError, match=f"Broken.{said}"):
        adapt_model(broken, "broken")


def test_what_is_no_adapter_or_returns_another_type_is_named(adapter):
    with pytest.raises(TypeError, match=r"model must be a ModelAdapter .* got OwnDecoder"):
        adapt_model(adapter.decoder, "own")
    for method, kind in (("project", "AttentionInputs"), ("weights", "LayerWeights")):
        plain = {method: lambda self, *given, method=method: tuple(getattr(OwnAdapter, method)(self, *given))}
        with pytest.raises(TypeError, match=f"Plain.{method} must return {kind}, got tuple"):
            adapt_model(type("Plain", (OwnAdapter,), plain)(adapter.decoder, BASE), "plain")


def test_a_missing_method_and_a_wrong_number_of_layers_are_named(adapter):
    bare = type("Bare", (butler_jax.ModelAdapter,), {})()
    bare.config = BASE
    with pytest.raises(TypeError, match="Bare must define layers"):
        adapt_model(bare, "bare")
    deeper = OwnAdapter(adapter.decoder, dataclasses.replace(BASE, layers=5))
    with pytest.raises(ValueError, match="has 3 layers, but the adapter's config says 5"):
        adapt_model(deeper, "deeper")
