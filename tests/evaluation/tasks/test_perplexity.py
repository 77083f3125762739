"""Perplexity against a pass position by position, and beside the dense pass."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.data.windows import cut_strided_windows, cut_windows, find_counted
from butler_jax.evaluation import evaluate, measure_perplexity
from butler_jax.evaluation.report.summary import summarise
from butler_jax.model.decoder import forward
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import simulate
from tests.tiny_evaluations import make_perplexity_evaluation
from tests.tiny_models import BASE, SCORES, make_batch, make_model, naive, next_nll


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_perplexity_is_exp_of_mean_over_predicted_tokens(model):
    batches = cut_windows(np.random.default_rng(1).integers(0, 61, 90), context=40)
    found = measure_perplexity(model, batches, make_policy("dense"), SelectionConfig(budget=1.0))
    nll = []
    for batch in batches:
        size = int(batch["segments"].sum())
        logits, _, _ = naive(model, batch["tokens"][0, :size], SCORES["oracle"], 1.0)
        nll.append(next_nll(logits, batch["tokens"][0, :size]))
    # float32 likelihoods against float64
    assert found.perplexity.value == pytest.approx(np.exp(np.concatenate(nll).mean()), rel=1e-4)
    assert found.perplexity.n == sum(map(len, nll)) and found.share_attended.value == 1


@pytest.mark.slow
def test_strided_perplexity_is_that_of_each_tokens_own_window(model):
    ids = np.random.default_rng(3).integers(0, 61, 50)
    found = measure_perplexity(
        model, cut_strided_windows(ids, context=20, stride=8), make_policy("dense"), SelectionConfig(budget=1.0)
    ).perplexity
    nll, done = [], 1
    for start in range(0, 38, 8):
        window = jnp.asarray(ids[start : start + 20])[None]
        logs = np.asarray(jax.nn.log_softmax(forward(model, window)))[0]
        last = min(start + 20, 50)
        nll += [-logs[t - 1 - start, ids[t]] for t in range(done, last)]
        done = last
    assert found.n == 49 and found.value == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


def test_comparisons_with_the_dense_pass(model):
    batch = make_batch([[60], [40]], 60)
    dense, oracle = make_policy("dense"), make_policy("oracle")
    streams = []
    measure_perplexity(model, [batch], dense, SelectionConfig(budget=1.0), keep=streams)
    selection = SelectionConfig(budget=0.3)
    found = measure_perplexity(model, [batch], oracle, selection, references=streams)
    same = measure_perplexity(model, [batch], oracle, SelectionConfig(budget=1.0), references=streams)
    assert same.mean("agrees").value == 1 and same.mean("divergence").value < 1e-6
    sparse = simulate(model, batch, oracle, selection)
    own = np.asarray(sparse.greedy)
    other = np.asarray(simulate(model, batch, dense, SelectionConfig(budget=1.0)).greedy)
    counted = find_counted(batch)
    assert found.mean("agrees").value == pytest.approx((own == other)[counted].mean()) and found.agrees.sum() > 0
    assert 0 < found.mean("divergence").value < math.log(2)
    over = found.excess_over(measure_perplexity(model, [batch], dense, SelectionConfig(budget=1.0)))
    assert over.value == pytest.approx(found.perplexity.value / same.perplexity.value - 1, abs=1e-5)


@pytest.fixture
def place(model, tmp_path):
    return make_perplexity_evaluation(model, tmp_path)


def test_bytes_are_those_of_rows_read_and_of_what_is_looked_at(place):
    base, predictor, config = place
    report = evaluate(base, predictor, config)
    mean = np.mean([t + 1 for t in range(99)])  # keys that a row could read
    dense = report.value("perplexity", "dense", 1, "bytes_read")
    row = 2 * BASE.head_dim * 4 * BASE.kv_heads
    assert dense == pytest.approx(row * BASE.layers * mean)
    read = np.mean([(t + 1) + 2 * min(max(-(-(t + 1) // 2), 12), t + 1) for t in range(99)])
    assert report.value("perplexity", "streaming", 0.5, "bytes_read") == pytest.approx(row * read, rel=1e-5)
    looked = 8 * 4 * BASE.kv_heads * (BASE.layers - 1) * mean  # rank 8, float32, layers from 1 on
    found = report.value("perplexity", "tokenbutler", 0.5, "bytes_read")
    assert found == pytest.approx(row * read + looked, rel=1e-5)
    apart = dataclasses.replace(config, selection=dataclasses.replace(config.selection, interval=4))
    kept = evaluate(base, predictor, apart).value("perplexity", "tokenbutler", 0.5, "bytes_read")
    assert kept - looked / 4 == pytest.approx(row * read, rel=0.1)  # a few more tokens, since the choice
    share = report.value("perplexity", "tokenbutler", 0.5, "bytes_of_dense")
    assert share == pytest.approx(found / dense, rel=1e-5)
    assert f"{100 * share:.1f}\u00a0% of what dense reads, all layers" in " ".join(summarise(report.rows))


@pytest.mark.slow
def test_bytes_and_shares_are_those_of_all_layers_and_of_served_ones(tmp_path):
    slides = dict(sliding_window=20, sliding_layers=(True, False, True))
    base, _, config = make_perplexity_evaluation(make_model(dataclasses.replace(BASE, **slides)), tmp_path)
    predictor = make_predictor(base.config, PredictorConfig(rank=8, stride=2))
    report = evaluate(base, predictor, dataclasses.replace(config, budgets=(0.5,)))
    count = np.arange(1, 100)  # keys that a row could read
    window, read = np.minimum(count, 20), np.minimum(np.maximum(-(-count // 2), 12), count)
    row, looked = 2 * BASE.head_dim * 4 * BASE.kv_heads, 8 * 4 * BASE.kv_heads * count  # rank 8, float32, layer 1
    wanted = {
        ("streaming", "bytes_read"): row * (2 * window + read),
        ("streaming", "served_bytes_read"): row * read,
        ("tokenbutler", "bytes_read"): row * (2 * window + read) + looked,
        ("tokenbutler", "served_bytes_read"): row * read + looked,
        ("dense", "bytes_read"): row * (2 * window + count),
        ("dense", "served_bytes_read"): row * count,
    }
    found = {key: report.value("perplexity", key[0], 1 if key[0] == "dense" else 0.5, key[1]) for key in wanted}
    assert found == pytest.approx({key: values.mean() for key, values in wanted.items()}, rel=1e-5)
    for prefix in ("", "served_"):
        share = found["tokenbutler", f"{prefix}bytes_read"] / found["dense", f"{prefix}bytes_read"]
        assert report.value("perplexity", "tokenbutler", 0.5, f"{prefix}bytes_of_dense") == pytest.approx(share)
    (line,) = (r for r in report.rows if (r["policy"], r["budget"], r["metric"]) == ("streaming", 0.5, "perplexity"))
    share, of_dense = read.sum() / count.sum(), (2 * window + read).sum() / (2 * window + count).sum()
    assert line["attended"] == pytest.approx(share) and line["attended_of_dense"] == pytest.approx(of_dense)
    sparsity = report.value("perplexity", "streaming", 0.5, "effective_sparsity")
    assert sparsity == pytest.approx(1 - (2 + share) / 3)
    heads = report.arrays["reads"]["streaming"][0]["heads"]
    assert heads[1] == [None] * BASE.kv_heads and heads[0] == pytest.approx([share] * BASE.kv_heads, abs=1e-5)
    text = report.save(tmp_path / "report").with_name("report.md").read_text().replace("\u00a0", " ")
    assert f"{100 * share:.1f} % read, {100 * of_dense:.1f} % in all layers" in text
    assert "of the keys, in the served layers, and of what dense reads" in text
    assert "layer 0" not in text and "layers after the first" not in text


@pytest.mark.slow
def test_a_report_has_the_reads_of_every_layer_head_and_position(model, tmp_path):
    base, predictor, config = make_perplexity_evaluation(model, tmp_path)
    policies, allocations = ("dense", "oracle_residual"), ("per_head", "tolerance")
    config = dataclasses.replace(config, policies=policies, allocations=allocations, budgets=(0.5, 40), prompt_tokens=8)
    report = evaluate(base, predictor, config)
    assert set(report.arrays["reads"]) == {"oracle_residual", "oracle_residual:tolerance"}
    attended = {(r["policy"], r["budget"]): r["attended"] for r in report.rows}
    for policy, found in report.arrays["reads"].items():
        assert [one["budget"] for one in found] == [0.5, 40]
        for one in found:
            assert np.shape(one["heads"]) == (BASE.layers - 1, BASE.kv_heads)
            assert np.mean(one["heads"]) == pytest.approx(attended[policy, one["budget"]], abs=1e-4)
            assert (np.ptp(one["heads"]) > 1e-3) == (policy == "oracle_residual:tolerance")
            assert one["positions"][: 8 // one["bin_size"]] == [None] * (8 // one["bin_size"])
    even = report.arrays["reads"]["oracle_residual"][1]
    count = np.arange(8, 100)
    share, bins = np.minimum(count + 1, 40) / (count + 1), count // even["bin_size"]
    for number, value in enumerate(even["positions"]):
        if value is not None and (number + 1) * even["bin_size"] < 90:
            assert value == pytest.approx(share[bins == number].mean(), abs=1e-4)
