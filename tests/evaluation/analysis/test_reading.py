"""What a row reads, and attention beside scores, against naive numpy forms in float64."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from butler_jax.evaluation.analysis.reading import compare_attention, find_reading
from butler_jax.policies import make_policy
from butler_jax.predictors import PREDICTORS, make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import simulate
from tests.marked import slow
from tests.tiny_models import BASE, NaivePredictor, make_batch, make_model, naive, softmax

CLOSE = dict(atol=2e-5)  # float32 weights after three layers, against float64


@pytest.mark.parametrize("position", [-1, 40])
def test_a_row_reads_what_the_simulation_reads(model, batch, predictor, position):
    one = {k: v[1:] for k, v in batch.items()}
    selection = SelectionConfig(budget=0.375)
    found = find_reading(model, predictor, one, make_policy("tokenbutler"), selection, position=position)
    t = 49 if position == -1 else position
    assert found.position == t
    score = NaivePredictor(predictor, 50)
    _, sets, _ = naive(model, one["tokens"][0, :50], score, 0.375)
    for layer in range(3):
        for kv in range(2):
            assert np.flatnonzero(found.sets[layer, kv]).tolist() == sets[layer][2 * kv, t]
    np.testing.assert_array_equal(
        found.counts, sum(np.isin(range(64), sets[layer][h, t]) for layer in (1, 2) for h in (0, 2))
    )
    np.testing.assert_array_equal(found.by_layer.sum(1), [2 * len(sets[layer][0, t]) for layer in range(3)])
    assert found.most == 4
    attended = simulate(model, one, make_policy("tokenbutler"), selection, predictor).attended[0, t]
    assert found.counts.sum() / (4 * (t + 1)) == pytest.approx(float(attended), rel=1e-6)


def test_a_predictor_with_an_offset_chooses_as_it_does_in_the_simulation(model, batch):
    one = {k: v[:1] for k, v in batch.items()}
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    assert predictor.config.offset == "share"
    predictor.heads.offset_bias[...] += jax.random.normal(jax.random.key(0), predictor.heads.offset_bias.shape)
    for selection in (SelectionConfig(budget=0.375), SelectionConfig(allocation="tolerance", tolerance=0.05)):
        found = find_reading(model, predictor, one, make_policy("tokenbutler"), selection)
        attended = simulate(model, one, make_policy("tokenbutler"), selection, predictor).attended[0, 59]
        assert found.counts.sum() / (4 * 60) == pytest.approx(float(attended), rel=1e-6)
        bound = find_reading(model, predictor, one, make_policy("tokenbutler", offset="share"), selection)
        np.testing.assert_array_equal(found.sets, bound.sets)


def test_a_policy_for_every_query_head_reads_as_many_sets(model, batch):
    one = {k: v[:1] for k, v in batch.items()}
    found = find_reading(model, None, one, make_policy("oracle_head"), SelectionConfig(budget=0.375))
    assert found.sets.shape == (3, 4, 64) and found.most == 8
    np.testing.assert_array_equal(found.sets.sum(-1)[1:], 23)  # ceil(0.375 * 60)


@pytest.mark.parametrize("kind", [k if k == "lookahead" else slow(k) for k in sorted(PREDICTORS)])
def test_attention_and_scores_are_those_of_one_head(model, kind):
    batch = make_batch([[37]], 40)
    predictor = make_predictor(BASE, PredictorConfig(kind=kind, rank=8, stride=2, hidden=24))
    score = NaivePredictor(predictor, 37)
    score.scale = np.asarray(model.layers.attention_norm[...], np.float64)
    _, _, weights = naive(model, batch["tokens"][0, :37], score, 1.0)
    for layer, head in ((1, 1), (2, 2)):
        found = compare_attention(model, predictor, batch, layer=layer, head=head)
        assert {a.shape for a in found} == {(37, 37)}
        for t in (0, 12, 36):
            row = score.rows[layer][head, t, : t + 1]
            np.testing.assert_allclose(found.attention[t, : t + 1], weights[layer][head, t], **CLOSE)
            np.testing.assert_allclose(found.scores[t, : t + 1], row, atol=1e-4)  # larger than weights
            np.testing.assert_allclose(found.predicted[t, : t + 1], softmax(row), **CLOSE)
            np.testing.assert_allclose(softmax(found.logits[t, : t + 1]), weights[layer][head, t], **CLOSE)
            assert not found.attention[t, t + 1 :].any() and not found.predicted[t, t + 1 :].any()
            assert np.isnan(found.logits[t, t + 1 :]).all() and np.isnan(found.scores[t, t + 1 :]).all()


def test_a_row_reads_nothing_impossible(model, batch, predictor):
    one = {k: v[:1] for k, v in batch.items()}
    long = make_model(dataclasses.replace(BASE, context=4096))
    with pytest.raises(ValueError, match="tokenbutler needs a trained predictor"):
        find_reading(model, None, one, make_policy("tokenbutler"))
    with pytest.raises(ValueError, match="the batch has 2 rows"):
        find_reading(model, predictor, batch, make_policy("tokenbutler"))
    with pytest.raises(ValueError, match="position 60 is outside of the text, which has 60 tokens"):
        find_reading(model, predictor, one, make_policy("tokenbutler"), position=60)
    with pytest.raises(ValueError, match="layer 0 has no scores"):
        compare_attention(model, predictor, one, layer=0, head=0)
    with pytest.raises(ValueError, match=r"head must be 0 \.\.\. 3, got 4"):
        compare_attention(model, predictor, one, layer=1, head=4)
    with pytest.raises(ValueError, match=r"2049 tokens .* at most 2048"):
        compare_attention(long, predictor, make_batch([[2049]], 2049), layer=1, head=0)


@pytest.mark.slow
def test_layers_that_are_not_served_read_their_windows(batch):
    base = dataclasses.replace(BASE, layers=4, sliding_window=20, sliding_layers=(True, False, True, False))
    model, one = make_model(base), {k: v[:1] for k, v in batch.items()}
    found = find_reading(model, None, one, make_policy("oracle"), SelectionConfig(budget=0.375))
    assert found.sets.sum(-1).tolist() == [[20, 20], [23, 23], [20, 20], [23, 23]]  # ceil(0.375 * 60)
    assert found.most == 4 and found.counts.sum() == 4 * 23
    predictor = make_predictor(base, PredictorConfig(rank=8))
    with pytest.raises(ValueError, match="layer 2 slides and is not served, so it has no scores"):
        compare_attention(model, predictor, one, layer=2, head=0)
