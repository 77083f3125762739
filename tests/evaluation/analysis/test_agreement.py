"""Agreement of heads and steps, overlap, drift and access, against naive numpy forms in float64."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.evaluation.analysis.agreement import (
    bin_means,
    measure_access,
    measure_divergence,
    measure_drift,
    measure_head_agreement,
    measure_overlap,
    measure_step_agreement,
)
from butler_jax.policies import make_policy
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import measure_recall
from tests.marked import long
from tests.tiny_models import BASE, SCORES, NaivePredictor, make_batch, make_model, naive, softmax

SIZES = (60, 50)  # of the documents of the batch
CLOSE = dict(atol=2e-5)  # float32 weights after three layers, against float64
SETS = dict(atol=1e-6)  # shares of small sets, which are the same sets


@pytest.fixture(scope="module")
def seen(model, batch, predictor):
    """For each row of the batch: true weights [l][h, t], and predicted scores [l][h, t, :] where l > 0."""
    found = []
    for row, size in enumerate(SIZES):
        score = NaivePredictor(predictor, size)
        _, _, weights = naive(model, batch["tokens"][row, :size], score, 1.0)
        found.append((weights, score.rows))
    return found


def divergence(p, q):
    """Jensen-Shannon divergence, term by term."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        for x in (a, b):
            total += x * np.log(2 * x / (a + b)) / 2 if x > 0 else 0.0
    return total


def top(scores, count):
    return set(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def renormalised(weights, keys):
    return weights[:keys] / weights[:keys].sum()


def test_divergence_is_its_formula_and_ends_at_log_2():
    random = np.random.default_rng(0)
    p, q = softmax(random.normal(size=(2, 5, 9)) * 3)
    p[0, :4] = 0
    p[0] /= p[0].sum()
    found = measure_divergence(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(found, [divergence(a, b) for a, b in zip(p, q, strict=True)], rtol=1e-5)  # float32
    apart = measure_divergence(jnp.asarray([1.0, 0.0, 0.0]), jnp.asarray([0.0, 0.5, 0.5]))
    assert float(apart) == pytest.approx(np.log(2), rel=1e-6)
    assert float(measure_divergence(jnp.asarray(p[0], jnp.float32), jnp.asarray(p[0], jnp.float32))) == 0


def test_head_agreement_is_the_mean_divergence_of_pairs_of_heads(model, batch, seen):
    found = measure_head_agreement(model, batch, rows=9)
    assert found.shape == (3, 4, 4)
    for layer, a, b in ((0, 0, 1), (1, 1, 3), (2, 2, 0)):
        wanted = [
            divergence(weights[layer][a, t], weights[layer][b, t])
            for (weights, _), size in zip(seen, SIZES, strict=True)
            for t in range(size - 9, size)
        ]
        np.testing.assert_allclose(found[layer, a, b], np.mean(wanted), **CLOSE)
    np.testing.assert_array_equal(found, found.swapaxes(1, 2))
    np.testing.assert_array_equal(found[:, range(4), range(4)], 0)
    assert 0 < found.max() <= np.log(2)


def test_step_agreement_is_over_the_keys_that_all_steps_see(model, batch, seen):
    found = measure_step_agreement(model, batch, rows=6)
    assert found.shape == (3, 6, 6)
    for layer, a, b in ((0, 0, 5), (1, 2, 3), (2, 4, 1)):
        wanted = []
        for (weights, _), size in zip(seen, SIZES, strict=True):
            first = size - 6
            rows = ([renormalised(weights[layer][h, first + n], first + 1) for n in (a, b)] for h in range(4))
            wanted += [divergence(*pair) for pair in rows]
        np.testing.assert_allclose(found[layer, a, b], np.mean(wanted), **CLOSE)
    np.testing.assert_array_equal(found, found.swapaxes(1, 2))
    np.testing.assert_array_equal(found[:, range(6), range(6)], 0)


def test_overlap_is_that_of_the_best_tenth_of_what_was_cached(model, batch, predictor, seen):
    found = measure_overlap(model, predictor, batch, rows=8)
    assert found.true.shape == found.predicted.shape == (2, 3, 4, 8)
    np.testing.assert_array_equal(found.true[..., 0], 1)
    np.testing.assert_array_equal(found.predicted[:, 1:, :, 0], 1)
    for row, size in enumerate(SIZES):
        weights, scores = seen[row]
        keys = size - 8 + 1
        count = -(-keys // 10)
        for layer in range(3):
            for head in range(4):
                best = [top(weights[layer][head, t][:keys], count) for t in range(keys - 1, size)]
                wanted = [len(best[0] & other) / count for other in best]
                np.testing.assert_allclose(found.true[row, layer, head], wanted, **SETS)
                if layer:
                    best = [top(scores[layer][head, t, :keys], count) for t in range(keys - 1, size)]
                    wanted = [len(best[0] & other) / count for other in best]
                    np.testing.assert_allclose(found.predicted[row, layer, head], wanted, **SETS)
    mean, error = found.curve()
    each = found.true[:, 1:].mean((1, 2))
    np.testing.assert_allclose(mean, each.mean(0), rtol=1e-6)  # the same mean in another order
    np.testing.assert_allclose(error, np.abs(each[0] - each[1]) / 2, atol=1e-7)  # of two values
    assert measure_overlap(model, None, batch, rows=8).predicted is None


def test_a_sliding_window_leaves_the_keys_in_common():
    model = make_model(dataclasses.replace(BASE, sliding_window=40))
    batch = make_batch([[60]], 60)
    found = measure_overlap(model, None, batch, rows=6)
    _, _, weights = naive(model, batch["tokens"][0], lambda layer, head, t, true: true, 1.0, sliding=40)
    for head in range(4):
        best = [top(weights[2][head, t][5 - n : 40 - n], 4) for n, t in enumerate(range(54, 60))]  # columns 20 ... 54
        np.testing.assert_allclose(found.true[0, 2, head], [len(best[0] & b) / 4 for b in best], **SETS)
    with pytest.raises(ValueError, match="sliding window is 40 tokens: 20 rows"):
        measure_step_agreement(model, batch, rows=20)


def test_drift_is_measured_from_the_row_before(model, batch, predictor, seen):
    found = measure_drift(model, predictor, batch, rows=5, distance=3)
    for row, size in enumerate(SIZES):
        weights, _ = seen[row]
        for n, t in enumerate(range(size - 5, size)):
            early, late = weights[1][2, t - 3], weights[1][2, t][: t - 2]
            count = -(-(t - 2) // 10)
            wanted = 1 - len(top(early, count) & top(late, count)) / count
            np.testing.assert_allclose(found.moved[row, 1, 2, n], wanted, **SETS)
            wanted = divergence(early, renormalised(late, t - 2))
            np.testing.assert_allclose(found.divergence[row, 1, 2, n], wanted, **CLOSE)


@pytest.mark.slow
def test_hit_rate_is_that_of_recall(model, predictor):
    batch = make_batch([[64]], 64)
    found = measure_drift(model, predictor, batch, rows=32, distance=1)
    policy = [make_policy("tokenbutler")]
    whole, first = (
        measure_recall(model, predictor, [{k: v[:, :n] for k, v in batch.items()}], policy, [0.5]) for n in (64, 32)
    )
    whole, first = (found.hit_rate["tokenbutler"] for found in (whole, first))
    assert (whole.n, first.n) == (3, 1)  # rows 31, 47 and 63, and row 31
    wanted = (3 * whole.value - first.value) / 2
    rows = found.hit_rate[:, 1:, :, [47 - 32, 63 - 32]]
    assert rows.mean() == pytest.approx(wanted, abs=1e-6)  # float32 sums in another order


def test_bins_hold_every_value_once_and_their_means():
    x = np.array([3, 1, 2, 2, 9, 4, 0, 7.0])
    found = bin_means(x, 10 * x, bins=3)
    assert found.count.sum() == 8 and np.all(np.diff(found.x) > 0)
    np.testing.assert_allclose(found.y, 10 * found.x)
    np.testing.assert_allclose((found.x * found.count).sum(), x.sum())
    lacking = bin_means(np.array([1, np.nan, 3, 4]), np.array([1, 2, np.nan, 4]), bins=2)
    assert lacking.y.tolist() == [1, 4]
    single = bin_means(np.zeros(4), np.array([1, 2, 3, 4.0]))
    assert single.count.tolist() == [4] and single.error[0] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)


def test_access_is_that_of_rows_that_choose(model, batch):
    with pytest.raises(ValueError, match="the interval must be 1, got 8"):
        measure_access(model, None, batch, make_policy("oracle"), SelectionConfig(interval=8))


@pytest.mark.parametrize("name", [name if name == "oracle" else long(name) for name in sorted(SCORES)])
def test_access_counts_the_rows_that_read_a_token(model, batch, name):
    found = measure_access(model, None, batch, make_policy(name), SelectionConfig(budget=0.375), rows=7)
    assert found.frequency.shape == (2, 3, 2, 64) and found.consistency.shape == (2, 3, 2, 6)
    agreement = np.zeros((7, 7))
    for row, size in enumerate(SIZES):
        # up to layer 1, where layer 0 has read everything, the sparse pass is the dense one
        _, sets, _ = naive(model, batch["tokens"][row, :size], SCORES[name], 0.375)
        for kv in range(2):
            own = [set(sets[1][2 * kv, t]) for t in range(size - 7, size)]
            for j in range(64):
                able = [s for t, s in zip(range(size - 7, size), own, strict=True) if j <= t]
                wanted = np.mean([j in s for s in able]) if able and j < size else np.nan
                np.testing.assert_allclose(found.frequency[row, 1, kv, j], wanted, **SETS)
            wanted = [len(a & b) / len(a) for a, b in pairwise(own)]
            np.testing.assert_allclose(found.consistency[row, 1, kv], wanted, **SETS)
            agreement += np.array([[len(a & b) / len(a | b) for b in own] for a in own]) / 4
    np.testing.assert_allclose(found.agreement[1], agreement, **SETS)
    np.testing.assert_array_equal(found.frequency[0, 0, 0, :60], 1)


def test_what_cannot_be_measured_is_said(model, batch):
    with pytest.raises(ValueError, match="20 rows need a document of at least 51 tokens"):
        measure_head_agreement(model, batch, rows=20)
    with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
        measure_overlap(model, None, batch, rows=4, fraction=1.5)
    with pytest.raises(ValueError, match="needs a trained predictor"):
        measure_drift(model, None, batch, rows=4)
    with pytest.raises(ValueError, match="h2o evicts"):
        measure_access(model, None, batch, make_policy("h2o"), rows=4)


@pytest.mark.slow
def test_analyses_take_bfloat16_as_it_is(batch, predictor):
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), make_model())
    found = measure_head_agreement(model, batch, rows=4)
    assert found.dtype == np.float32 and np.isfinite(found).all() and (found[:, 0, 0] == 0).all()
