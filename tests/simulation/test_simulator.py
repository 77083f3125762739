"""The simulated pass against a naive form, position by position in float64."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.decoder import forward
from butler_jax.policies import make_policy
from butler_jax.predictors import PREDICTORS, make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import simulate
from butler_jax.simulation.predictions import jensen_shannon
from tests.marked import long, slow
from tests.tiny_models import BASE, SCORES, NaivePredictor, make_batch, make_model, naive, next_nll


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("sliding", [None, slow(20)])
@pytest.mark.parametrize("policy", [name if name == "oracle" else slow(name) for name in sorted(SCORES)])
def test_simulation_equals_position_by_position_form(policy, sliding):
    model = make_model(dataclasses.replace(BASE, sliding_window=sliding))
    batch = make_batch([[37], [30]], 37)
    for budget in (0.5, 0.25):
        result = simulate(model, batch, make_policy(policy), SelectionConfig(budget=budget))
        for row, size in enumerate((37, 30)):
            tokens = batch["tokens"][row, :size]
            logits, _, _ = naive(model, tokens, SCORES[policy], budget, sliding=sliding)
            # float32 against float64 through three layers; a wrongly chosen key changes the first digits
            np.testing.assert_allclose(result.nll[row, : size - 1], next_nll(logits, tokens), atol=2e-4)
            np.testing.assert_array_equal(result.greedy[row, :size], logits.argmax(-1))


@pytest.mark.parametrize("slides", [(True, False, True, False), slow((False, True, True, False))])
def test_layers_that_slide_beside_others_read_their_windows_and_choose_nothing(slides):
    base = dataclasses.replace(BASE, layers=4, sliding_window=16, sliding_layers=slides)
    model, batch, served = make_model(base), make_batch([[37]], 37), [n for n in range(1, 4) if not slides[n]]
    result = simulate(model, batch, make_policy("oracle"), SelectionConfig(budget=0.375))
    windows = tuple(16 if s else None for s in slides)
    wanted, chosen, _ = naive(model, batch["tokens"][0], SCORES["oracle"], 0.375, sliding=windows)
    # float32 against float64 through four layers; a wrongly chosen key changes the first digits
    np.testing.assert_allclose(result.nll[0, :36], next_nll(wanted, batch["tokens"][0]), atol=2e-4)
    for t in (0, 11, 20, 36):
        read = [len(chosen[n][0, t]) for n in range(4)]
        dense = [min(t + 1, w or t + 1) for w in windows]
        assert [r < d for r, d in zip(read, dense, strict=True)] == [n in served and t > 12 for n in range(4)]
        own = sum(read[n] for n in served)
        assert result.attended[0, t] == pytest.approx(own / len(served) / (t + 1))
        assert result.served[0, t] == pytest.approx(BASE.kv_heads * own)
        assert result.read[0, t] == pytest.approx(BASE.kv_heads * sum(read))
        assert result.of_dense[0, t] == pytest.approx(sum(read) / sum(dense))


@pytest.mark.parametrize("kind", [k if k == "lookahead" else slow(k) for k in sorted(PREDICTORS)])
def test_simulated_predictor_equals_position_by_position_form(kind):
    base = dataclasses.replace(BASE, layers=4)  # two producers, at layers 0 and 2
    model = make_model(base)
    predictor = make_predictor(base, PredictorConfig(kind=kind, rank=8, stride=2, hidden=24))
    if kind == "lookahead":  # any pairs, others for each head
        random = np.random.default_rng(2)
        pairs = [[np.sort(random.permutation(8)[:4]) for _ in range(2)] for _ in range(3)]
        predictor.heads.pairs[...] = jnp.asarray(pairs, jnp.int32)
    batch = make_batch([[37]], 37)
    result = simulate(model, batch, make_policy("tokenbutler"), SelectionConfig(budget=0.375), predictor)
    score = NaivePredictor(predictor, 37)
    score.scale = np.asarray(model.layers.attention_norm[...], np.float64)
    wanted, chosen, _ = naive(model, batch["tokens"][0], score, 0.375)
    # float32 against float64 through four layers; a wrongly chosen key changes the first digits
    np.testing.assert_allclose(result.nll[0, :36], next_nll(wanted, batch["tokens"][0]), atol=2e-4)
    recent = [{*range(min(4, t + 1)), *range(max(0, t - 7), t + 1)} for t in range(37)]
    assert any(set(own) != recent[t] for sets in chosen[1:] for (_, t), own in sets.items() if t > 32)


@pytest.mark.parametrize("kind", [k if k == "contextual" else long(k) for k in sorted(PREDICTORS)])
def test_full_budget_equals_dense_pass(model, kind):
    predictor = make_predictor(BASE, PredictorConfig(kind=kind, rank=8, stride=2))
    batch = make_batch([[20, 80], [100], [128]], 128)
    result = simulate(model, batch, make_policy("tokenbutler"), SelectionConfig(budget=1.0), predictor)
    logits = jax.jit(forward)(model, **{k: jnp.asarray(v) for k, v in batch.items()})
    following = np.roll(batch["tokens"], -1, axis=1)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), following[..., None], axis=-1)[..., 0]
    same = (batch["segments"] > 0) & (np.roll(batch["segments"], -1, axis=1) == batch["segments"])
    same[:, -1] = False
    # the same float32 sums in another order
    np.testing.assert_allclose(result.nll, np.where(same, nll, 0), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(result.attended), 1.0)


@pytest.mark.parametrize("policy", ["tokenbutler", slow("oracle"), *map(long, ("oracle_head", "random"))])
def test_documents_and_padding_change_nothing(model, policy):
    predictor = make_predictor(BASE, PredictorConfig(kind="contextual", rank=8, stride=2))
    batch = make_batch([[50, 75], [50], [75]], 128)
    for row, first, size in ((1, 0, 50), (2, 50, 75)):
        batch["tokens"][row, :size] = batch["tokens"][0, first : first + size]
    result = simulate(model, batch, make_policy(policy), SelectionConfig(budget=0.25), predictor)
    for row, first, size in ((1, 0, 50), (2, 50, 75)):
        packed = result.nll[0, first : first + size - 1]
        # rows stand in other chunks: other order of float32 sums
        np.testing.assert_allclose(packed, result.nll[row, : size - 1], atol=2e-4)


@pytest.mark.parametrize("budget", [0.5, 0.125, 16])
def test_attended_fraction_is_the_budget(model, budget):
    batch = make_batch([[128], [1], [1]], 128)
    result = simulate(model, batch, make_policy("random"), SelectionConfig(budget=budget))
    counts = np.arange(1, 129)
    wanted = budget if isinstance(budget, int) else np.maximum(np.ceil(budget * counts), 12)
    wanted = np.minimum(wanted, counts)
    # float32 means of small fractions
    np.testing.assert_allclose(result.attended[0], wanted / counts, rtol=1e-5)


def test_divergence_is_jensen_and_shannons():
    random = np.random.default_rng(1)
    p, q = (random.dirichlet(np.full(7, 0.3), 5) for _ in range(2))
    middle = (p + q) / 2
    wanted = 0.5 * (p * np.log(p / middle)).sum(-1) + 0.5 * (q * np.log(q / middle)).sum(-1)
    found = jensen_shannon(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q)))
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # float32
    apart = jnp.log(jnp.asarray([[1.0, 1e-30], [1e-30, 1.0]]))
    assert float(jensen_shannon(apart[:1], apart[1:])[0]) == pytest.approx(math.log(2), abs=1e-6)


def test_keys_read_are_counted_in_all_layers_and_heads(model):
    batch = make_batch([[40]], 40)
    found = simulate(model, batch, make_policy("streaming"), SelectionConfig(budget=14))
    length = np.arange(1, 41)
    read = BASE.kv_heads * (length + 2 * np.minimum(length, 14))  # layer 0 reads all, two layers read 14
    np.testing.assert_allclose(found.read[0], read, rtol=1e-5)
    every = simulate(model, batch, make_policy("oracle_head"), SelectionConfig(budget=14))
    np.testing.assert_allclose(
        every.read[0], BASE.kv_heads * length + BASE.heads * 2 * np.minimum(length, 14), rtol=1e-5
    )


@pytest.mark.slow
def test_rows_that_are_not_wanted_cost_no_logits_and_change_nothing_else(model):
    batch = make_batch([[200]], 200)
    wanted = np.zeros((1, 200), bool)
    wanted[0, 150:160] = True
    whole, part = (
        simulate(model, batch, make_policy("oracle"), SelectionConfig(budget=0.5), wanted=w)
        for w in (None, jnp.asarray(wanted))
    )
    np.testing.assert_array_equal(np.asarray(part.nll)[wanted], np.asarray(whole.nll)[wanted])
    np.testing.assert_array_equal(np.asarray(part.greedy)[wanted], np.asarray(whole.greedy)[wanted])
    assert not np.asarray(part.nll)[0, :128].any()  # chunks of 64 rows without a wanted one


def test_bad_input_is_named(model):
    batch, wrong = make_batch([[9]], 9), make_batch([[9]], 9)
    wrong["tokens"] = wrong["tokens"] + model.config.vocab_size
    with pytest.raises(ValueError, match=r"there is the token \d+; the vocabulary is 0 ..."):
        simulate(model, wrong, "oracle", SelectionConfig(budget=0.5))
    with pytest.raises(ValueError, match="the policy oracle needs a selection"):
        simulate(model, batch, "oracle", None)
    for other in ([batch], batch["tokens"], {"tokens": batch["tokens"]}):
        with pytest.raises(ValueError, match="a batch is a dictionary of tokens, segments, positions"):
            simulate(model, other, "oracle", SelectionConfig(budget=0.5))
    narrow = make_predictor(dataclasses.replace(BASE, width=16), PredictorConfig(kind="contextual", rank=8))
    with pytest.raises(ValueError, match="the predictor is of a base of other sizes"):
        simulate(model, batch, "tokenbutler", SelectionConfig(budget=0.5), narrow)
    with pytest.raises(ValueError, match="policy must be a policy or its name, got 3"):
        simulate(model, batch, 3, SelectionConfig(budget=0.5))
    with pytest.raises(ValueError, match="a floor goes with the allocation per_layer"):
        simulate(model, batch, "oracle", SelectionConfig(budget=0.5, floor=0.2))
    assert float(simulate(model, batch, "dense", None).attended.min()) == 1
