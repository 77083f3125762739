"""Pictures show the arrays they are given."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.evaluation.analysis import pictures
from butler_jax.evaluation.analysis.agreement import (
    PUBLISHED,
    Overlap,
    bin_means,
    measure_access,
    measure_drift,
)
from butler_jax.evaluation.analysis.reading import Reading, compare_attention, find_reading
from butler_jax.policies import make_policy
from butler_jax.selection.config import SelectionConfig


def lines(ax):
    return [line.get_ydata() for line in ax.get_lines()]


def image(ax):
    return np.asarray(ax.get_images()[0].get_array())


def test_pictures_show_the_arrays_they_are_given():
    random = np.random.default_rng(0)
    pairs = random.random((3, 4, 4))
    figure = pictures.draw_head_agreement(pairs, shown=2)
    np.testing.assert_allclose(lines(figure.axes[0])[0], pairs[:, ~np.eye(4, dtype=bool)].mean(1))
    np.testing.assert_array_equal(image(figure.axes[1]), pairs[0])
    np.testing.assert_array_equal(image(figure.axes[2]), pairs[2])
    steps = random.random((3, 5, 5))
    figure = pictures.draw_step_agreement(steps)
    np.testing.assert_allclose(image(figure.axes[0]), steps[1:].mean(0))
    np.testing.assert_allclose(lines(figure.axes[1])[-1][-1], steps[1:, 0, 4].mean())
    found = Overlap(random.random((2, 3, 4, 12)), random.random((2, 3, 4, 12)))
    (ax,) = pictures.draw_overlap(found).axes
    np.testing.assert_allclose(lines(ax)[0], found.true[:, 1:].mean((0, 1, 2)))
    np.testing.assert_allclose(lines(ax)[1], found.predicted[:, 1:].mean((0, 1, 2)))
    np.testing.assert_array_equal(lines(ax)[2], [PUBLISHED[step] for step in (1, 5, 10)])
    assert "published for Llama-3.1-8B" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_wide_pictures_keep_every_column():
    sets = np.random.default_rng(0).random((3, 2, 450)) < 0.1
    figure = pictures.draw_reading(Reading(sets, 449, "oracle", SelectionConfig()))
    drawn = image(figure.axes[1])
    assert drawn.shape == (450, 450)
    np.testing.assert_array_equal(drawn[[0, 149, 150, 449]], sets.sum(1)[[0, 0, 1, 2]])
    assert figure.axes[1].get_images()[0].get_extent() == [-0.5, 449.5, 2.5, -0.5]


@pytest.mark.slow
def test_pictures_of_a_model_show_what_was_measured(model, batch, predictor):
    one = {k: v[:1] for k, v in batch.items()}
    drift = measure_drift(model, predictor, batch, rows=8, distance=2)
    figure = pictures.draw_drift(drift, bins=4)
    for ax, x in zip(figure.axes, (drift.moved, drift.divergence), strict=True):
        np.testing.assert_allclose(lines(ax)[0], bin_means(x[:, 1:], drift.hit_rate[:, 1:], 4).y)
    access = measure_access(model, None, batch, make_policy("oracle"), SelectionConfig(budget=0.375), rows=7)
    often, agree, kept, *_ = pictures.draw_access(access, 1).axes
    np.testing.assert_allclose(image(often)[:, :50], access.frequency[1].mean(1)[:, :50])
    np.testing.assert_allclose(image(agree), access.agreement[1:].mean(0))
    np.testing.assert_allclose(lines(kept)[0], access.consistency[:, 1:].mean((0, 2, 3)))
    scored = compare_attention(model, predictor, one, layer=1, head=3)
    left, right, _ = pictures.draw_scores(scored).axes
    for ax, weights in ((left, scored.attention), (right, scored.predicted)):
        shown = ax.get_images()[0].get_array()
        np.testing.assert_allclose(shown[59, :60], np.clip(weights[59, :60], 1e-4, 1))
        assert shown.mask[10, 11:].all()
    scales = [ax.get_images()[0].norm for ax in (left, right)]
    assert scales[0] is scales[1]
    read = find_reading(model, predictor, one, make_policy("tokenbutler"), SelectionConfig(budget=0.375))
    figure = pictures.draw_reading(read)
    np.testing.assert_allclose([bar.get_height() for bar in figure.axes[0].patches], read.counts[:60] / read.most)
    np.testing.assert_array_equal(image(figure.axes[1]), read.by_layer[:, :60])
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pictures_touch_no_global_state(monkeypatch):
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    pictures.draw_step_agreement(np.zeros((2, 3, 3)))
    assert dict(matplotlib.rcParams) == before and not _pylab_helpers.Gcf.figs
