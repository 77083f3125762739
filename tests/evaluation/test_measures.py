"""Standard errors, divergences, rank correlation, strided windows, bytes and kept cells, against naive forms."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.evaluation import evaluate, measure_perplexity
from butler_jax.evaluation.cells import Cell, Finding, Kept, Progress, duration
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.report.markdown import markdown
from butler_jax.evaluation.report.page import page
from butler_jax.evaluation.report.summary import ERRORS, summary
from butler_jax.evaluation.report.tables import tables
from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.evaluation.tasks.perplexity import counted_rows, strided, windows
from butler_jax.model.decoder import forward
from butler_jax.policies import POLICIES, make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.runs import provenance
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import simulate
from butler_jax.simulation.predictions import jensen_shannon
from butler_jax.simulation.recall import mean_ranks, rank_correlation
from butler_jax.simulation.statistics import Estimate, ratio, share
from butler_jax.weights import Base
from tests.tiny_models import BASE, Letters, make_batch, make_model


def test_a_ratios_error_is_that_of_resampled_sequences():
    random = np.random.default_rng(0)
    counts = random.integers(5, 50, 200)
    sums = counts * 2.0 + random.normal(size=200) * counts
    found = ratio(sums, counts)
    drawn = random.integers(0, 200, (4000, 200))
    resampled = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert found.value == pytest.approx(sums.sum() / counts.sum()) and found.n == counts.sum()
    assert found.error == pytest.approx(resampled.std(), rel=0.05)  # 4,000 draws: 1.1 % of themselves


def test_an_estimate_of_one_sequence_has_no_error_and_of_none_no_value():
    assert ratio([3.0, 0.0], [2, 0]) == Estimate(1.5, None, 2, 1)
    assert Estimate(math.log(2), 0.1, 5, 3).exp() == pytest.approx((2, 0.2, 5, 3))
    with pytest.raises(ValueError, match="nothing to take a mean of"):
        ratio([0.0], [0])


@pytest.mark.parametrize("count", [2, 4, 20, 500])
def test_where_all_samples_agree_the_error_is_the_reach_of_the_wilson_interval(count):
    # The ends p of the interval of one standard error solve (found - p)^2 = p (1 - p) / n.
    for found in (0, 1):
        ends = np.roots([1 + 1 / count, -(2 * found + 1 / count), found**2])
        error = share(np.full(count, found), np.ones(count)).error
        assert error == pytest.approx(np.abs(ends - found).max(), abs=1e-9)
    some = np.arange(count) < 1
    assert share(some, np.ones(count)) == ratio(some, np.ones(count)) and share([1.0], [1]).error is None


def test_divergence_is_jensen_and_shannons():
    random = np.random.default_rng(1)
    p, q = (random.dirichlet(np.full(7, 0.3), 5) for _ in range(2))
    middle = (p + q) / 2
    wanted = 0.5 * (p * np.log(p / middle)).sum(-1) + 0.5 * (q * np.log(q / middle)).sum(-1)
    found = jensen_shannon(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q)))
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # float32
    apart = jnp.log(jnp.asarray([[1.0, 1e-30], [1e-30, 1.0]]))
    assert float(jensen_shannon(apart[:1], apart[1:])[0]) == pytest.approx(math.log(2), abs=1e-6)


def naive_ranks(values):
    return np.asarray([(np.sum(values < v) + np.sum(values <= v) + 1) / 2 for v in values])


def test_rank_correlation_is_pearsons_of_mean_ranks():
    random = np.random.default_rng(2)
    true, scores = random.normal(size=(1, 1, 2, 3, 40)), random.integers(0, 6, (1, 1, 2, 3, 40)).astype(float)
    scores[0, 0, 1, 2] = 1.0  # all equal
    allowed = np.arange(40)[None, None] <= np.asarray([7, 20, 39])[None, :, None]
    mask = jnp.asarray(allowed)
    ranks = mean_ranks(jnp.asarray(true), mask)
    found = np.asarray(rank_correlation(jnp.asarray(scores), ranks, mask))
    for g, c in np.ndindex(2, 3):
        a, b = (naive_ranks(x[0, 0, g, c][allowed[0, c]]) for x in (true, scores))
        wanted = 0.0 if b.std() == 0 else np.corrcoef(a, b)[0, 1]
        assert found[0, 0, g, c] == pytest.approx(wanted, abs=1e-5)
        np.testing.assert_array_equal(np.asarray(ranks)[0, 0, g, c][allowed[0, c]], a)


@pytest.mark.parametrize(("size", "context", "stride"), [(25, 10, 5), (23, 10, 4), (8, 10, 3), (30, 10, 9), (9, 9, 1)])
def test_strided_windows_predict_every_token_but_the_first_once(size, context, stride):
    seen = []
    for batch in strided(range(size), context=context, stride=stride, batch_size=2):
        counted = counted_rows(batch)
        for row, place in zip(*np.nonzero(counted), strict=True):
            token = batch["tokens"][row, place + 1]
            assert token == batch["tokens"][row, place] + 1
            assert place + 1 >= min(token, context - stride)  # tokens before it
            seen.append(int(token))
    assert sorted(seen) == list(range(1, size))


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_strided_perplexity_is_that_of_each_tokens_own_window(model):
    ids = np.random.default_rng(3).integers(0, 61, 50)
    found = measure_perplexity(
        model, strided(ids, context=20, stride=8), make_policy("dense"), SelectionConfig(budget=1.0)
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
    hidden = []
    measure_perplexity(model, [batch], dense, SelectionConfig(budget=1.0), keep=hidden)
    selection = SelectionConfig(budget=0.3)
    found = measure_perplexity(model, [batch], oracle, selection, references=hidden)
    same = measure_perplexity(model, [batch], oracle, SelectionConfig(budget=1.0), references=hidden)
    assert same.mean("agrees").value == 1 and same.mean("divergence").value < 1e-6
    sparse = simulate(model, batch, oracle, selection)
    own = np.asarray(sparse.greedy)
    other = np.asarray(simulate(model, batch, dense, SelectionConfig(budget=1.0)).greedy)
    counted = counted_rows(batch)
    assert found.mean("agrees").value == pytest.approx((own == other)[counted].mean()) and found.agrees.sum() > 0
    assert 0 < found.mean("divergence").value < math.log(2)
    over = found.over(measure_perplexity(model, [batch], dense, SelectionConfig(budget=1.0)))
    assert over.value == pytest.approx(found.perplexity.value / same.perplexity.value - 1, abs=1e-5)


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


def test_budgets_that_mean_the_same_tokens_are_run_once(model, monkeypatch):
    import butler_jax.evaluation.tasks.passes as module

    ran, original = [], module.simulate
    monkeypatch.setattr(module, "simulate", lambda *a, **k: ran.append(a[2].name) or original(*a, **k))
    passes, batch = Passes(model), make_batch([[30], [20]], 48)
    wanted = batch["segments"] > 0
    first = passes(batch, make_policy("oracle"), SelectionConfig(budget=0.25), wanted=wanted)
    again = passes(batch, make_policy("oracle"), SelectionConfig(budget=0.125), wanted=wanted)  # 12 tokens as well
    assert again is first and ran == ["oracle"]
    passes(batch, make_policy("streaming"), SelectionConfig(budget=0.25), wanted=wanted)
    passes(batch, make_policy("oracle"), SelectionConfig(budget=0.5), wanted=wanted)
    assert ran == ["oracle", "streaming", "oracle"]
    for name in ("oracle", "streaming"):  # everything is read
        passes(batch, make_policy(name), SelectionConfig(budget=30), wanted=wanted)
    assert ran[3:] == ["dense"]


@pytest.fixture
def place(model, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    config = EvalConfig(
        tasks="perplexity", text=tmp_path / "text.txt", tokens=300, context=100, budgets="1/2,32", batch_size=3,
        policies="dense,streaming,tokenbutler",
    )  # fmt: skip
    return Base("letters", model, Letters(), "f"), predictor, config


def test_finished_cells_are_not_measured_again(place, tmp_path):
    base, predictor, config = place
    first = evaluate(base, predictor, config, keep=tmp_path / "out")
    file = tmp_path / "out" / "cells.jsonl"
    lines = file.read_text().splitlines()
    assert [json.loads(line)["policy"] for line in lines] == ["dense"] + ["streaming"] * 2 + ["tokenbutler"] * 2
    # The last cell was cut off while it was written, and one is lost.
    file.write_text("\n".join(lines[:2] + lines[3:4] + [lines[4][:80]]))
    said = []
    again = evaluate(base, predictor, config, keep=tmp_path / "out", say=said.append)
    assert again.rows == first.rows
    assert ["kept" in line for line in said] == [True, True, False, True, False]
    assert (first.about["cells"], again.about["cells"]) == ({"measured": 5, "kept": 0}, {"measured": 2, "kept": 3})
    took = {json.loads(line)["key"]: json.loads(line)["seconds"] for line in lines[:2] + lines[3:4]}
    took |= {json.loads(line)["key"]: json.loads(line)["seconds"] for line in file.read_text().splitlines()[-2:]}
    assert again.about["seconds"] == pytest.approx(sum(took.values()), abs=0.051) and len(took) == 5
    assert f"{again.about['seconds']:,.0f} s for 5 cells, 3 of them kept from earlier evaluations" in page(again)
    assert "left" in said[0] and "left" not in said[-1]
    other = make_predictor(BASE, PredictorConfig(rank=8, stride=2), seed=5)
    said.clear()
    evaluate(base, other, config, keep=tmp_path / "out", say=said.append)
    assert ["kept" in line for line in said] == [True, True, True, False, False]  # another predictor, other cells


@pytest.mark.parametrize("stride", [None, 60])
def test_a_report_says_over_how_many_windows_errors_are_and_whether_these_overlap(place, stride):
    base, predictor, config = place
    config = dataclasses.replace(config, stride=stride, tasks="perplexity,attention")
    report = evaluate(base, predictor, config)
    windows = 3 if stride is None else 5  # of 100 tokens, over 300
    assert {(r["sequences"], r["unit"]) for r in report.rows} == {
        (windows, "windows" if stride is None else "overlapping windows")
    }
    said = "± standard error over 3 windows"
    said = (
        said if stride is None else "± standard error over 5 overlapping windows, which are not independent: too small"
    )
    text, whole = markdown(report), page(report)
    assert text.count(said) == whole.count(said) == len(tables(report.rows))
    assert ERRORS in whole and ERRORS in text


NEWEST = """
from dataclasses import dataclass
import jax.numpy as jnp
from butler_jax.policies import Scoring

@dataclass(frozen=True, kw_only=True)
class Newest(Scoring):
    name = "newest"

    def scores(self, chunk):
        like = jnp.zeros_like(chunk.logits)
        return like + SIGN * chunk.columns.astype(jnp.float32)[None, None, None, None]
"""


@pytest.mark.parametrize("in_a_file", [True, False])
def test_a_policy_that_was_edited_is_measured_anew(place, tmp_path, monkeypatch, in_a_file):
    base, _, config = place
    config = dataclasses.replace(config, policies=("dense", "newest"), budgets=(0.5,))

    def judged(text):
        module = types.ModuleType("newest_of_a_test")  # as importing the file does it, or a notebook's cell
        (tmp_path / "newest.py").write_text(text)
        if in_a_file:
            module.__file__ = str(tmp_path / "newest.py")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(text, "newest.py", "exec"), vars(module))
        monkeypatch.setitem(POLICIES, "newest", module.Newest)
        said = []
        report = evaluate(base, None, config, keep=tmp_path / "out", say=said.append)
        return ["kept" in line for line in said], report.value("perplexity", "newest", 0.5)

    kept, newest = judged(NEWEST.replace("SIGN", "1.0"))
    assert kept == [False, False]
    assert judged(NEWEST.replace("SIGN", "1.0")) == ([True, True], newest)
    kept, oldest = judged(NEWEST.replace("SIGN", "-1.0"))
    assert kept == [True, False] and oldest != newest


def test_another_version_of_the_package_measures_anew(place, tmp_path, monkeypatch):
    base, predictor, config = place
    evaluate(base, predictor, config, keep=tmp_path / "out")
    known = {**provenance.versions(), "butler-jax": "9.9"}
    monkeypatch.setitem(evaluate.__globals__, "versions", lambda: known)
    said = []
    evaluate(base, predictor, config, keep=tmp_path / "out", say=said.append)
    assert not any("kept" in line for line in said)


def test_a_haystack_that_is_repeated_is_told_and_noted(place):
    base, _, config = place
    config = dataclasses.replace(
        config, tasks="needle", policies="dense", lengths=(300, 400, 500), depths=(0.5,), needles=1
    )
    said = []
    report = evaluate(base, None, config, say=said.append)
    told = f"{config.text} has 360 tokens: needles of 400, 500 tokens lie in it repeated; give a longer text"
    assert told in said and report.about["notes"] == [told] and told in html.unescape(page(report))
    assert evaluate(base, None, dataclasses.replace(config, lengths=(300,))).about["notes"] == []


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
    share = report.value("perplexity", "tokenbutler", 0.5, "bytes_of_dense")
    assert share == pytest.approx(found / dense, rel=1e-5)
    assert f"{100 * share:.1f}\u00a0% of the bytes that dense reads in all layers" in " ".join(summary(report.rows))


def test_a_directory_that_is_a_file_is_told(place, tmp_path):
    base, predictor, config = place
    for path in (tmp_path / "text.txt", tmp_path / "text.txt" / "deeper"):
        with pytest.raises(ValueError, match=r"text\.txt is a file, and the report needs a directory; give another"):
            evaluate(base, predictor, config, keep=path)


def test_the_time_left_is_that_of_cells_alike(tmp_path):
    said = []
    progress = Progress({"a": 3, "b": 1}, 5, said.append)
    cell = Cell([Finding("perplexity", Estimate(2.0, None, 1, 1), 0.5, 0.5)], seconds=10.0)
    progress.add("a", "oracle", cell, kept=False)
    assert progress.seconds_left() == 2 * 10 + 10
    progress.add("b", "oracle", Cell(cell.findings, seconds=100.0), kept=True)  # one more is to be measured
    assert progress.seconds_left() == 2 * 10 + 100
    shared = Progress({"a": 3, "b": 1}, 5, said.append, hosts=2)
    shared.add("a", "oracle", cell, kept=False)
    assert shared.seconds_left() == (2 * 10 + 10) / 2
    assert said[0].startswith("[1/5] a") and said[0].endswith("10 s, about 30 s left")
    assert [duration(s) for s in (40, 720, 11100)] == ["40 s", "12 min", "3 h 5 min"]
    kept = Kept(tmp_path)
    kept.add("k", {"task": "a"}, cell)
    assert Kept(tmp_path).cells == {"k": cell}


def test_windows_of_text_have_no_rows_left_out():
    batch = windows(range(12), context=6)[0]
    np.testing.assert_array_equal(counted_rows(batch)[0], [1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stride=5), "--stride must be 1 ... 1023, below the context, and needs --text"),
        (dict(tasks="lambada"), "the task lambada reads local files: give their directory with --downstream"),
        (dict(depths="1.5"), "--depths are 0 ... 1"),
        (dict(lengths="short"), "--lengths must be numbers separated by commas, got short"),
        (dict(budgets="0"), "budget"),
        (dict(attention_rows=0), "--attention-rows must be at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**changes)
