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
from tests.tiny_reports import BUDGETS, POLICIES, make_reads, report, row, rows


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
        "perplexity_by_bytes",
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
        "reliability",
        "distances",
        "reads_by_head",
        "reads_by_position",
    }
    for figure, picture, element in drawn:
        assert figure.caption and figure.alt
        assert len(list(ElementTree.fromstring(element).iter())) > 50
        image = matplotlib.image.imread(io.BytesIO(picture))
        assert image.shape[1] == 640
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


def test_perplexity_by_bytes_goes_through_the_rows():
    found = [r for r in rows() if r["task"] == "perplexity"]
    (figure,) = (f for f in plan_figures(found) if f.name == "perplexity_by_bytes")
    (axes,) = figure.draw().axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    value = {(r["metric"], r["policy"], r["budget"]): r["value"] for r in found}
    for policy in POLICIES[1:]:
        own = sorted((100 * value["bytes_of_dense", policy, b], value["perplexity", policy, b]) for b in BUDGETS)
        np.testing.assert_allclose(lines[policy].get_xydata(), own)
    assert not [f for f in plan_figures([r for r in found if r["metric"] == "perplexity"]) if "bytes" in f.name]


def test_distances_are_those_of_the_smallest_budget():
    made = report()
    (figure,) = (f for f in plan_figures(made.rows, made.arrays) if f.name == "distances")
    left, right = figure.draw().axes
    assert figure.title.endswith("budget 1/8") and len(left.lines) == len(right.lines) == len(made.arrays["distances"])
    np.testing.assert_allclose(left.lines[0].get_ydata(), [20, 10, 10])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [30, 30, 40])


def test_reliability_goes_through_the_means_of_the_bins():
    made = report()
    (figure,) = (f for f in plan_figures(made.rows, made.arrays) if f.name == "reliability")
    for panel, found in zip(figure.draw().axes, made.arrays["reliability"]["tokenbutler:lookahead"], strict=True):
        line = next(line for line in panel.get_lines() if line.get_label() == "tokenbutler:lookahead")
        np.testing.assert_allclose(line.get_xydata(), np.transpose([found["predicted"], found["true"]]))
    nothing = [{"predicted": [], "true": [], "count": []}] * 2
    assert not [
        f
        for f in plan_figures(made.rows, {"reliability": {"tokenbutler:lookahead": nothing}})
        if f.name == "reliability"
    ]


def test_reads_are_shown_where_heads_read_unequally():
    names = ("quest", "tokenbutler", "streaming")
    reads = {name: make_reads(number) for number, name in enumerate(names)}
    heads, positions = plan_figures([row("perplexity", "perplexity", p, 0.5, 3.0) for p in names], {"reads": reads})[1:]
    assert (heads.name, positions.name) == ("reads_by_head", "reads_by_position") and "1/8" in heads.title
    panels = [a for a in heads.draw().axes if a.get_images()]
    np.testing.assert_allclose(panels[0].get_images()[0].get_array(), 100 * np.array(reads["tokenbutler"][1]["heads"]))
    assert len([p for p in panels if p.get_title()]) == 1
    lines = {line.get_label(): line.get_xydata() for line in positions.draw().axes[0].get_lines()}
    assert set(lines) == {"quest", "tokenbutler"}  # streaming reads what quest does
    wanted = [(16 * (i + 0.5), 100 * s) for i, s in enumerate(reads["tokenbutler"][1]["positions"]) if s is not None]
    np.testing.assert_allclose(lines["tokenbutler"], wanted)
    assert not [f for f in plan_figures([], {"reads": {"quest": reads["quest"]}}) if "reads" in f.name]


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
        "oracle oracle_head oracle_residual oracle_residual:tolerance random streaming h2o snapkv citrus quest lowrank "
        "tokenbutler:a tokenbutler:b tokenbutler:c tokenbutler:d new newer newest new:tolerance"
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
