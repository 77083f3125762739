"""Figures of a report show the rows."""

from __future__ import annotations

import ast
import io
import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from butler_jax.evaluation.plots import assign_looks, render_figure
from butler_jax.evaluation.report import pages
from butler_jax.evaluation.report.figures import plan_figures
from tests.tiny_reports import POLICIES, report, row, rows


@pytest.fixture(scope="module")
def drawn():
    made = report()
    return [(f, *render_figure(f.draw, f.name, f.alt)) for f in plan_figures(made.rows, made.arrays)]


def test_every_figure_shows_something(drawn):
    import matplotlib.image

    assert {f.name for f, *_ in drawn} == {
        "perplexity",
        "perplexity_over_dense",
        "perplexity_js_divergence",
        "perplexity_top1_agreement",
        "perplexity_bytes_read",
        "attention_recalled_mass",
        "needle_accuracy",
        "key_value_accuracy",
        "variables_accuracy",
        "lambada_accuracy",
        "piqa_accuracy",
        "coreference_miss_rate",
        "coreference_miss_rate_by_distance",
        "needle_accuracy_grid",
        "hit_rate_heads",
    }
    for figure, picture, element in drawn:
        assert figure.caption and figure.alt
        assert len(list(ElementTree.fromstring(element).iter())) > 50
        image = matplotlib.image.imread(io.BytesIO(picture))
        assert image.shape[1] == 720
        colours = (255 * image[..., :3]).round().astype(int) @ np.array([65536, 256, 1])
        assert len(np.unique(colours)) > 50


def test_curves_go_through_the_rows():
    found = [r for r in rows() if r["metric"] == "perplexity"]
    (figure,) = plan_figures(found)
    (axes,) = figure.draw().axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    for policy in POLICIES[1:]:
        own = sorted((100 * r["attended"], r["value"]) for r in found if r["policy"] == policy)
        np.testing.assert_allclose(lines[policy].get_xydata(), own)
    np.testing.assert_allclose(lines["dense"].get_ydata(), next(r["value"] for r in found if r["policy"] == "dense"))


@pytest.mark.parametrize("depths", [(0.0, 0.5, 1.0), tuple(i / 10 for i in range(11))])
def test_a_heat_map_names_every_depth_without_overlap(depths):
    lengths = (256, 512)
    found = [
        row("needle", "accuracy", p, b, 0.5, where={"depth": d, "length": n})
        for p in ("quest", "streaming")
        for b in (0.5, 0.125)
        for d in depths
        for n in lengths
    ]
    canvas = plan_figures(found)[0].draw()
    canvas.draw_without_rendering()
    (axes,) = (a for a in canvas.axes if a.get_ylabel() == "depth")
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == [f"{depth:g}" for depth in depths]
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))


def test_a_policy_looks_the_same_everywhere_and_like_no_other():
    seen = {}
    for axes in [axes for figure in plan_figures(rows()) for axes in figure.draw().axes]:
        for line in axes.get_lines():
            seen.setdefault(line.get_label(), set()).add((line.get_color(), line.get_linewidth()))
    assert all(len(seen[policy]) == 1 for policy in POLICIES)
    labels = (
        "oracle oracle_head random streaming h2o snapkv quest lowrank tokenbutler:a tokenbutler:b tokenbutler:c "
        "tokenbutler:d new newer newest"
    ).split()
    found = assign_looks(labels)
    assert len({(v.color, v.marker) for v in found.values()}) == len(labels)
    assert min(v.width for k, v in found.items() if k.startswith("tokenbutler")) > max(
        v.width for k, v in found.items() if not k.startswith("tokenbutler")
    )


def test_matplotlib_is_imported_only_to_draw():
    for path in Path(pages.__file__).parent.parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not any((n or "").startswith("matplotlib") for n in names), path
