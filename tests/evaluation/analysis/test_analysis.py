"""Analyses of attention, what a row reads, their pictures and coloured text, against naive numpy forms in float64."""

from __future__ import annotations

import dataclasses
import html
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import butler_jax
from butler_jax.evaluation.analysis import pictures
from butler_jax.evaluation.analysis.agreement import (
    PUBLISHED,
    Overlap,
    binned,
    head_agreement,
    hit_rate_and_drift,
    js_divergence,
    overlap,
    step_agreement,
    token_access,
)
from butler_jax.evaluation.analysis.coloured import colour, coloured_text
from butler_jax.evaluation.analysis.reading import Reading, attention_and_scores, reading_of
from butler_jax.evaluation.analysis.rows import last_rows, text_batch
from butler_jax.policies import make_policy
from butler_jax.predictors import PREDICTORS, make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import measure_recall, simulate
from tests.tiny_models import BASE, SCORES, NaivePredictor, make_batch, make_model, naive, softmax

SIZES = (60, 50)  # two rows of one document each
CLOSE = dict(atol=2e-5)  # float32 weights after three layers, against float64
SETS = dict(atol=1e-6)  # shares of small sets, which are the same sets


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def batch():
    return make_batch([[n] for n in SIZES], 64)


@pytest.fixture(scope="module")
def predictor():
    return make_predictor(BASE, PredictorConfig(kind="producer", rank=8, stride=2, hidden=24))


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
    found = js_divergence(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(found, [divergence(a, b) for a, b in zip(p, q, strict=True)], rtol=1e-5)  # float32
    apart = js_divergence(jnp.asarray([1.0, 0.0, 0.0]), jnp.asarray([0.0, 0.5, 0.5]))
    assert float(apart) == pytest.approx(np.log(2), rel=1e-6)
    assert float(js_divergence(jnp.asarray(p[0], jnp.float32), jnp.asarray(p[0], jnp.float32))) == 0


def test_head_agreement_is_the_mean_divergence_of_pairs_of_heads(model, batch, seen):
    found = head_agreement(model, batch, rows=9)
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
    found = step_agreement(model, batch, steps=6)
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
    found = overlap(model, predictor, batch, steps=8)
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
    assert overlap(model, None, batch, steps=8).predicted is None


def test_a_sliding_window_leaves_the_keys_in_common():
    model = make_model(dataclasses.replace(BASE, sliding_window=40))
    batch = make_batch([[60]], 60)
    found = overlap(model, None, batch, steps=6)
    _, _, weights = naive(model, batch["tokens"][0], lambda layer, head, t, true: true, 1.0, sliding=40)
    for head in range(4):
        best = [top(weights[2][head, t][5 - n : 40 - n], 4) for n, t in enumerate(range(54, 60))]  # columns 20 ... 54
        np.testing.assert_allclose(found.true[0, 2, head], [len(best[0] & b) / 4 for b in best], **SETS)
    with pytest.raises(ValueError, match="sliding window is 40 tokens: 20 rows"):
        step_agreement(model, batch, steps=20)


def test_drift_is_measured_from_the_row_before(model, batch, predictor, seen):
    found = hit_rate_and_drift(model, predictor, batch, rows=5, distance=3)
    for row, size in enumerate(SIZES):
        weights, _ = seen[row]
        for n, t in enumerate(range(size - 5, size)):
            early, late = weights[1][2, t - 3], weights[1][2, t][: t - 2]
            count = -(-(t - 2) // 10)
            wanted = 1 - len(top(early, count) & top(late, count)) / count
            np.testing.assert_allclose(found.moved[row, 1, 2, n], wanted, **SETS)
            wanted = divergence(early, renormalised(late, t - 2))
            np.testing.assert_allclose(found.divergence[row, 1, 2, n], wanted, **CLOSE)


def test_hit_rate_is_that_of_recall(model, predictor):
    batch = make_batch([[64]], 64)
    found = hit_rate_and_drift(model, predictor, batch, rows=32, distance=1)
    policy = [make_policy("tokenbutler")]
    whole, first = (
        measure_recall(model, predictor, [{k: v[:, :n] for k, v in batch.items()}], policy, [0.5]) for n in (64, 32)
    )
    whole, first = (found.hit_rate["tokenbutler"] for found in (whole, first))
    assert (whole.n, first.n) == (33, 1)  # of 32 keys or more
    wanted = (33 * whole.value - first.value) / 32
    assert found.hit_rate[:, 1:].mean() == pytest.approx(wanted, abs=1e-6)  # float32 sums in another order


def test_bins_hold_every_value_once_and_their_means():
    x = np.array([3, 1, 2, 2, 9, 4, 0, 7.0])
    found = binned(x, 10 * x, bins=3)
    assert found.count.sum() == 8 and np.all(np.diff(found.x) > 0)
    np.testing.assert_allclose(found.y, 10 * found.x)
    np.testing.assert_allclose((found.x * found.count).sum(), x.sum())
    single = binned(np.zeros(4), np.array([1, 2, 3, 4.0]))
    assert single.count.tolist() == [4] and single.error[0] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_access_counts_the_rows_that_read_a_token(model, batch, name):
    found = token_access(model, None, batch, make_policy(name), SelectionConfig(budget=0.375), rows=7)
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


@pytest.mark.parametrize("position", [-1, 40])
def test_a_row_reads_what_the_simulation_reads(model, batch, predictor, position):
    one = {k: v[1:] for k, v in batch.items()}
    selection = SelectionConfig(budget=0.375)
    found = reading_of(model, predictor, one, make_policy("tokenbutler"), selection, position=position)
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


def test_a_policy_for_every_query_head_reads_as_many_sets(model, batch):
    one = {k: v[:1] for k, v in batch.items()}
    found = reading_of(model, None, one, make_policy("oracle_head"), SelectionConfig(budget=0.375))
    assert found.sets.shape == (3, 4, 64) and found.most == 8
    np.testing.assert_array_equal(found.sets.sum(-1)[1:], 23)  # ceil(0.375 * 60)


@pytest.mark.parametrize("kind", sorted(PREDICTORS))
def test_attention_and_scores_are_those_of_one_head(model, kind):
    batch = make_batch([[37]], 40)
    predictor = make_predictor(BASE, PredictorConfig(kind=kind, rank=8, stride=2, hidden=24))
    score = NaivePredictor(predictor, 37)
    score.scale = np.asarray(model.layers.attention_norm[...], np.float64)
    _, _, weights = naive(model, batch["tokens"][0, :37], score, 1.0)
    for layer, head in ((1, 1), (2, 2)):
        found = attention_and_scores(model, predictor, batch, layer=layer, head=head)
        assert {a.shape for a in found} == {(37, 37)}
        for t in (0, 12, 36):
            row = score.rows[layer][head, t, : t + 1]
            np.testing.assert_allclose(found.attention[t, : t + 1], weights[layer][head, t], **CLOSE)
            np.testing.assert_allclose(found.scores[t, : t + 1], row, atol=1e-4)  # larger than weights
            np.testing.assert_allclose(found.predicted[t, : t + 1], softmax(row), **CLOSE)
            np.testing.assert_allclose(softmax(found.logits[t, : t + 1]), weights[layer][head, t], **CLOSE)
            assert not found.attention[t, t + 1 :].any() and not found.predicted[t, t + 1 :].any()
            assert np.isnan(found.logits[t, t + 1 :]).all() and np.isnan(found.scores[t, t + 1 :]).all()


def test_what_cannot_be_done_is_said(model, batch, predictor):
    one = {k: v[:1] for k, v in batch.items()}
    with pytest.raises(ValueError, match="20 rows need a document of at least 51 tokens"):
        head_agreement(model, batch, rows=20)
    with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
        overlap(model, None, batch, steps=4, fraction=1.5)
    with pytest.raises(ValueError, match="needs a trained predictor"):
        hit_rate_and_drift(model, None, batch, rows=4)
    with pytest.raises(ValueError, match="h2o evicts"):
        token_access(model, None, batch, make_policy("h2o"), rows=4)
    with pytest.raises(ValueError, match="tokenbutler needs a trained predictor"):
        reading_of(model, None, one, make_policy("tokenbutler"))
    with pytest.raises(ValueError, match="the batch has 2 rows"):
        reading_of(model, predictor, batch, make_policy("tokenbutler"))
    with pytest.raises(ValueError, match="position 60 is outside of the text, which has 60 tokens"):
        reading_of(model, predictor, one, make_policy("tokenbutler"), position=60)
    with pytest.raises(ValueError, match="layer 0 has no scores"):
        attention_and_scores(model, predictor, one, layer=0, head=0)
    with pytest.raises(ValueError, match=r"head must be 0 \.\.\. 3, got 4"):
        attention_and_scores(model, predictor, one, layer=1, head=4)
    long = make_model(dataclasses.replace(BASE, context=4096))
    with pytest.raises(ValueError, match=r"2049 tokens .* at most 2048"):
        attention_and_scores(long, predictor, make_batch([[2049]], 2049), layer=1, head=0)


def test_rows_are_the_last_of_the_last_document():
    batch = make_batch([[20, 44], [50]], 64)
    np.testing.assert_array_equal(last_rows(batch, 3), [[61, 62, 63], [47, 48, 49]])
    with pytest.raises(ValueError, match=r"14 rows need a document of at least 45 tokens, .* one has 44"):
        last_rows(batch, 14)


# --- pictures ---------------------------------------------------------------------------------------


def lines(ax):
    return [line.get_ydata() for line in ax.get_lines()]


def image(ax):
    return np.asarray(ax.get_images()[0].get_array())


def test_pictures_show_the_arrays_they_are_given():
    random = np.random.default_rng(0)
    pairs = random.random((3, 4, 4))
    figure = pictures.head_agreement_figure(pairs, shown=2)
    np.testing.assert_allclose(lines(figure.axes[0])[0], pairs[:, ~np.eye(4, dtype=bool)].mean(1))
    np.testing.assert_array_equal(image(figure.axes[1]), pairs[0])
    np.testing.assert_array_equal(image(figure.axes[2]), pairs[2])
    steps = random.random((3, 5, 5))
    figure = pictures.step_agreement_figure(steps)
    np.testing.assert_allclose(image(figure.axes[0]), steps[1:].mean(0))
    np.testing.assert_allclose(lines(figure.axes[1])[-1][-1], steps[1:, 0, 4].mean())
    found = Overlap(random.random((2, 3, 4, 12)), random.random((2, 3, 4, 12)))
    (ax,) = pictures.overlap_figure(found).axes
    np.testing.assert_allclose(lines(ax)[0], found.true[:, 1:].mean((0, 1, 2)))
    np.testing.assert_allclose(lines(ax)[1], found.predicted[:, 1:].mean((0, 1, 2)))
    np.testing.assert_array_equal(lines(ax)[2], [PUBLISHED[step] for step in (1, 5, 10)])
    assert "published for Llama-3.1-8B" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_wide_pictures_keep_every_column():
    sets = np.random.default_rng(0).random((3, 2, 450)) < 0.1
    figure = pictures.reading_figure(Reading(sets, 449, "oracle", SelectionConfig()))
    drawn = image(figure.axes[1])
    assert drawn.shape == (450, 450)
    np.testing.assert_array_equal(drawn[[0, 149, 150, 449]], sets.sum(1)[[0, 0, 1, 2]])
    assert figure.axes[1].get_images()[0].get_extent() == [-0.5, 449.5, 2.5, -0.5]


def test_pictures_of_a_model_show_what_was_measured(model, batch, predictor, tmp_path):
    one = {k: v[:1] for k, v in batch.items()}
    drift = hit_rate_and_drift(model, predictor, batch, rows=8, distance=2)
    figure = pictures.drift_figure(drift, bins=4)
    for ax, x in zip(figure.axes, (drift.moved, drift.divergence), strict=True):
        np.testing.assert_allclose(lines(ax)[0], binned(x[:, 1:], drift.hit_rate[:, 1:], 4).y)
    access = token_access(model, None, batch, make_policy("oracle"), SelectionConfig(budget=0.375), rows=7)
    often, agree, kept, *_ = pictures.access_figure(access, 1).axes
    np.testing.assert_allclose(image(often)[:, :50], access.frequency[1].mean(1)[:, :50])
    np.testing.assert_allclose(image(agree), access.agreement[1:].mean(0))
    np.testing.assert_allclose(lines(kept)[0], access.consistency[:, 1:].mean((0, 2, 3)))
    scored = attention_and_scores(model, predictor, one, layer=1, head=3)
    left, right, _ = pictures.scores_figure(scored).axes
    for ax, weights in ((left, scored.attention), (right, scored.predicted)):
        shown = ax.get_images()[0].get_array()
        np.testing.assert_allclose(shown[59, :60], np.clip(weights[59, :60], 1e-4, 1))
        assert shown.mask[10, 11:].all()
    scales = [ax.get_images()[0].norm for ax in (left, right)]
    assert scales[0] is scales[1]
    read = reading_of(model, predictor, one, make_policy("tokenbutler"), SelectionConfig(budget=0.375))
    figure = pictures.reading_figure(read)
    np.testing.assert_allclose([bar.get_height() for bar in figure.axes[0].patches], read.counts[:60] / read.most)
    np.testing.assert_array_equal(image(figure.axes[1]), read.by_layer[:, :60])
    path = pictures.save(figure, tmp_path / "a" / "reading.png", dpi=40)
    assert path.read_bytes()[:8] == figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pictures_touch_no_global_state(monkeypatch):
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    pictures.step_agreement_figure(np.zeros((2, 3, 3)))
    assert dict(matplotlib.rcParams) == before and not _pylab_helpers.Gcf.figs


# --- coloured text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return butler_jax.load_base("tiny")


@pytest.mark.parametrize("text", ['if a < b && "c" > d:\n    return <b>é</b>', "naïve 🦋🦋 café — 東京", "plain words"])
def test_coloured_text_is_the_text_with_html_escaped(tiny, text):
    tokens = tiny.tokenizer.encode(text)
    counts = np.arange(len(tokens))
    page = coloured_text(tiny, tokens, counts)
    assert html.unescape(re.sub(r"<[^>]*>", "", page)) == text == tiny.tokenizer.decode(tokens)
    assert set(re.findall(r"<(/?\w+)", page)) == {"div", "/div", "span", "/span"}
    shown = colour(tiny, tokens, counts)
    assert shown.text == text and sum(shown.tokens) == len(tokens)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown.ansi()) == text
    assert "".join(p for p in shown.plain(least=2)) == text


def test_colours_and_tooltips_tell_the_counts(tiny):
    tokens = tiny.tokenizer.encode("one two three")
    counts = np.zeros(len(tokens))
    counts[-1] = 4
    shown = colour(tiny, tokens, counts, most=8, title="a <title>")
    spans = re.findall(r"<span title=\"([^\"]*)\"([^>]*)>", shown.html)
    assert len(spans) == len(tokens)
    assert spans[-1][0] == f"token {len(tokens) - 1}: 4 of 8" and "rgba(240, 120, 0, 0.325)" in spans[-1][1]
    assert spans[0] == ("token 0: 0 of 8", "")
    assert shown.ansi().count("\x1b[48;") == 1
    assert shown.plain().endswith(f"[{shown.pieces[-1]}]")
    assert "a &lt;title&gt;" in shown._repr_html_() and shown.html in shown._repr_html_()
    with pytest.raises(ValueError, match="2 tokens and 3 numbers"):
        colour(tiny, tokens[:2], np.ones(3))
    with pytest.raises(ValueError, match="0 or more"):
        colour(tiny, tokens[:2], np.array([1.0, -1.0]))


def test_a_text_becomes_a_batch_of_one_row(tiny):
    batch = text_batch(tiny, "The file is opened for reading.", 5)
    assert batch["tokens"].tolist() == [tiny.tokenizer.encode("The file is opened for reading.")[:5]]
    assert batch["segments"].tolist() == [[1] * 5] and batch["positions"].tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="at least 2"):
        text_batch(tiny, "")


def test_analyses_take_bfloat16_as_it_is(batch, predictor):
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), make_model())
    found = head_agreement(model, batch, rows=4)
    assert found.dtype == np.float32 and np.isfinite(found).all() and (found[:, 0, 0] == 0).all()
