"""What people look at after an evaluation: the same numbers in every form, whatever was judged."""

from __future__ import annotations

import ast
import html.parser
import io
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from butler_jax.evaluation.report import publishing
from butler_jax.evaluation.report.facts import facts
from butler_jax.evaluation.report.figures import figures
from butler_jax.evaluation.report.markdown import markdown
from butler_jax.evaluation.report.page import page
from butler_jax.evaluation.report.plotting import INK, looks, render
from butler_jax.evaluation.report.summary import glance, summary
from butler_jax.evaluation.report.tables import budget_label, budgets_of, detail_tables, metric_of, tables, title_of

POLICIES = ("dense", "oracle", "streaming", "quest", "tokenbutler:lookahead", "tokenbutler:producer")
BUDGETS = (0.5, 0.125, 64)


def row(task, metric, policy, budget, value, error=0.01, where=None, attended=None, n=64):
    share = {1: 1.0, 0.5: 0.51, 0.125: 0.16, 64: 0.3}.get(budget, budget)
    return {
        "task": task, "metric": metric, "policy": policy, "budget": budget, "value": value, "error": error, "n": n,
        "seed": 0, "attended": attended if attended is not None else share, "where": where or {},
    }  # fmt: skip


def rows(policies=POLICIES, budgets=BUDGETS):
    """Every task and metric, with values that no two cells share."""
    draw = np.random.default_rng(0)
    found = []
    for policy in policies:
        for budget in (1,) if policy == "dense" else budgets:
            add = lambda task, metric, value, where=None, p=policy, b=budget: found.append(  # noqa: E731
                row(task, metric, p, b, float(value), float(draw.uniform(0.001, 0.02)), where)
            )
            add("perplexity", "perplexity", draw.uniform(29, 90))
            add("perplexity", "bytes_read", draw.uniform(1e6, 4e7))
            if policy != "dense":
                add("perplexity", "over_dense", draw.uniform(-0.01, 2))
                add("perplexity", "js_divergence", draw.uniform(0, 0.5))
                add("perplexity", "top1_agreement", draw.uniform(0.3, 1))
                add("attention", "recalled_mass", draw.uniform(0.3, 1))
            for task in ("needle", "key_value", "variables", "lambada", "piqa"):
                add(task, "accuracy", draw.uniform(0, 1))
            add("coreference", "miss_rate", draw.uniform(0, 1))
            for distance in ("40-80", "80-160", "160-240"):
                add("coreference", "miss_rate", draw.uniform(0, 1), {"distance": distance})
            for depth in (0.0, 0.5, 1.0):
                for length in (256, 512):
                    add("needle", "accuracy", draw.uniform(0, 1), {"depth": depth, "length": length})
    for policy in (p for p in policies if p not in ("dense", "oracle")):
        found.append(row("attention", "hit_rate", policy, None, float(draw.uniform(0.5, 1))))
    return found


def few(found):
    """What needs few figures: perplexity, hit rate and the needle."""
    return [r for r in found if r["metric"] in ("perplexity", "over_dense", "hit_rate") or r["task"] == "needle"]


def report(found=None, **about):
    found = rows() if found is None else found
    rate = np.random.default_rng(1).uniform(0.5, 1, (5, 4)).tolist()
    policies = [p for p in dict.fromkeys(r["policy"] for r in found) if p not in ("dense", "oracle")]
    known = {
        "base": "a model", "fingerprint": "0123", "predictors": {"tokenbutler": {"kind": "lookahead", "rank": 16}},
        "policies": [{"name": "quest", "page": 16}], "versions": {"jax": "0.10"}, "device": "cpu",
        "config": {"budgets": [0.5, 64], "run": None}, "command": "python eval.py --run x", "date": "2026-01-02",
        "seconds": 3.0,
    }  # fmt: skip
    return SimpleNamespace(rows=found, arrays={"hit_rate": {p: rate for p in policies}}, about=known | about)


class Reader(html.parser.HTMLParser):
    """Tags, words and ids of a page, and its tables: {caption: {(policy, column): value}}."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.words, self.tables = [], [], [], {}
        self.into, self.caption, self.columns, self.policy, self.place = None, "", [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "table":
            self.caption, self.columns = "", []
        elif tag == "tr":
            self.policy, self.place = "", 0
        elif tag == "td":
            self.place += 1
        elif tag == "th":
            self.into = "column" if attributes["scope"] == "col" else "policy"
            self.columns += [""] if self.into == "column" else []
        elif tag in ("caption", "span", "style"):
            self.into = tag
        elif tag == "data":
            self.tables.setdefault(self.caption, {})[self.policy, self.columns[self.place]] = float(attributes["value"])

    def handle_endtag(self, tag):
        self.into = None

    def handle_data(self, data):
        self.words += [data] if self.into != "style" else []
        if self.into == "caption":
            self.caption += data.strip()
        elif self.into == "policy":
            self.policy += data
        elif self.into == "column":
            self.columns[-1] += data


def test_tables_have_policies_down_and_budgets_across():
    found = [row("needle", "accuracy", p, b, v) for p, b, v in
             (("dense", 1, 0.9), ("oracle", 0.5, 0.8), ("oracle", 64, 0.7), ("quest", 0.5, 0.6))]  # fmt: skip
    (table,) = tables(found)
    assert table.title == "needle: accuracy (%)"
    assert [c.label for c in table.columns] == ["dense", "1/2", "64 tokens"]
    assert [(line.policy, [c and c.value for c in line.cells]) for line in table.lines] == [
        ("dense", [0.9, None, None]), ("oracle", [None, 0.8, 0.7]), ("quest", [None, 0.6, None])]  # fmt: skip


def test_values_are_shown_in_their_unit():
    for metric, value, error, text, spread in (
        ("perplexity", 29.2041, 0.61, "29.204", "0.610"), ("over_dense", -0.0004, 0.00094, "\u22120.04", "0.09"),
        ("accuracy", 0.9731, 0.0042, "97.3", "0.4"), ("bytes_read", 3 * 2**20, None, "3.00", ""),
    ):  # fmt: skip
        (table,) = tables([row("perplexity", metric, "quest", 0.5, value, error)])
        assert (table.lines[0].cells[0].text, table.lines[0].cells[0].spread) == (text, spread), metric
    assert metric_of("bytes_read", [{"value": 900.0}]).unit == "B"


def test_an_accuracy_of_0_or_100_says_what_its_error_is():
    notes = [tables([row("needle", "accuracy", "quest", 0.5, v, 0.04)])[0].note for v in (0.0, 1.0, 0.5)]
    assert ["the reach of the Wilson interval, 1 / (samples + 1)" in note for note in notes] == [True, True, False]
    assert "Wilson" not in tables([row("perplexity", "top1_agreement", "quest", 0.5, 1.0)])[0].note


def test_budgets_are_written_as_they_are_given():
    assert [budget_label(b) for b in (0.5, 1 / 3, 0.0625, 0.3, 0.75, 1024, None)] == [
        "1/2", "1/3", "1/16", "0.3", "0.75", "1,024 tokens", ""]  # fmt: skip
    assert budgets_of([row("x", "y", "quest", b, 1.0) for b in (0.125, 64, 0.5)]) == [0.5, 64, 0.125]


@pytest.mark.parametrize(
    "metric, best", [("accuracy", "quest"), ("miss_rate", "streaming"), ("effective_sparsity", None)]
)
def test_the_best_that_is_no_reference_stands_out(metric, best):
    values = {"dense": 0.1, "oracle": 0.99, "oracle_head": 0.01, "quest": 0.8, "streaming": 0.2, "random": math.nan}
    (table,) = tables([row("x", metric, p, 1 if p == "dense" else 0.5, v) for p, v in values.items()])
    assert [line.policy for line in table.lines if any(c and c.best for c in line.cells)] == ([best] if best else [])


def test_a_column_says_what_was_read():
    found = [row("needle", "accuracy", p, 0.125, 0.5, attended=a) for p, a in (("oracle", 0.16), ("quest", 0.144))]
    assert tables(found)[0].columns[0].share == "14.4\u201316.0 % read"
    assert tables(found[:1])[0].columns[0].share == "16.0 % read"


def test_every_row_is_in_the_page_with_its_value():
    found = rows()
    shown = Reader(page(report(found))).tables
    for r in found:
        title = title_of(r["task"], metric_of(r["metric"], [q for q in found if q["metric"] == r["metric"]]))
        policy = r["policy"]
        budgets = BUDGETS if policy == "dense" else (r["budget"],)  # tables of parts have dense at every budget
        if not r["where"]:
            column = {1: "dense", None: "value"}.get(r["budget"]) or budget_label(r["budget"])
            assert shown[title][policy, column] == r["value"]
        elif r["task"] == "needle":
            length, column = r["where"]["length"], f"depth {r['where']['depth']:g}"
            for budget in budgets:
                assert shown[f"{title}, {budget_label(budget)}, length {length}"][policy, column] == r["value"]
        else:
            column = f"distance {r['where']['distance']}".replace("-", "\u2013")
            for budget in budgets:
                assert shown[f"{title}, {budget_label(budget)}"][policy, column] == r["value"]
    assert {v for t in shown.values() for v in t.values()} == {r["value"] for r in found}


def test_markdown_has_the_same_cells():
    text = markdown(report())
    for table in (*tables(rows()), *detail_tables(rows())):
        part = text.split(f" {table.title.replace('|', '')}\n", 1)[1]
        lines = [line for line in part.splitlines() if line.startswith("|")][: 2 + len(table.lines)]
        for line, shown in zip(table.lines, lines[2:], strict=True):
            cells = [c.strip().replace("*", "") for c in shown.strip("|").split("|")]
            want = [f"{c.text} ± {c.spread}" if c else "" for c in line.cells]
            assert cells == [line.policy, *want]


def test_the_main_result_follows_from_the_rows():
    over = {"oracle": 0.01, "tokenbutler": 0.02, "quest": 0.3, "random": 0.9}
    found = [row("perplexity", "perplexity", "dense", 1, 20.0, None)]
    found += [row("perplexity", "over_dense", p, 0.125, v, None) for p, v in over.items()]
    found += [row("needle", "accuracy", p, 0.125, v, None) for p, v in (("tokenbutler", 0.5), ("random", 0.6))]
    said = " ".join(summary(found)).replace("\u00a0", " ")
    assert "perplexity is 20.000." in said
    layers = "of the cache in the layers after the first"
    assert f"Reading 16.0 % {layers} (budget 1/8), tokenbutler is 2.00 % above it, and quest, the best" in said
    assert "better value in 1 of the 2 comparisons" in said
    text, needle = glance(found)
    assert [c.replace("\u00a0", " ") for c in text.cells] == ["+2.00 %", "quest +30.00 %", "+1.00 %", ""]
    assert text.butler_leads and not needle.butler_leads


def test_the_main_result_says_how_many_bytes_are_read_for_it():
    over = {"oracle": 0.01, "tokenbutler": 0.02, "quest": 0.3, "random": 0.9}
    read = {"oracle": 0.4, "tokenbutler": 0.45, "quest": 0.56, "random": 0.41}
    found = [row("perplexity", "perplexity", "dense", 1, 20.0, None)]
    found += [row("perplexity", "over_dense", p, 0.125, v, None) for p, v in over.items()]
    found += [row("perplexity", "bytes_of_dense", p, 0.125, v, 1e-4) for p, v in read.items()]
    said = " ".join(summary(found)).replace("\u00a0", " ")
    assert (
        "tokenbutler is 2.00 % above it (45.0 % of the bytes that dense reads in all layers, what it chooses by" in said
    )
    assert "quest, the best other policy, 30.00 % above (56.0 % of the bytes)." in said
    assert "better value in 1 of the 1 comparisons" in said
    cells = [c.replace("\u00a0", " ") for c in glance(found)[1].cells]
    assert cells == ["45.0 %", "quest 56.0 %", "40.0 %", "100.0 %"]
    note = tables(found)[1].note
    assert "% read: of the keys, in the layers after the first" in note


def test_names_are_shown_and_never_run():
    evil = '<script>alert("1")</script>|`*_[x](y)'
    found = [row(task, "accuracy", p, 0.5, 0.5) for task, p in (("needle", evil), ("needle", "quest"), (evil, "quest"))]
    judged = report(
        found, base=evil, command=evil, device=evil, config={evil: evil}, versions={evil: evil},
        predictors={evil: evil}, policies=[{"name": evil, "x": evil}],
    )  # fmt: skip
    pictures = [(f, render(f.draw, f.name, f.alt)[1]) for f in figures(found)]
    text = page(judged, pictures)
    assert "script" not in Reader(text).tags and "<script" not in text
    assert sum(evil in word for word in Reader(text).words) > 5
    assert "<script" not in re.sub(r"```.*?```", "", markdown(judged, [f for f, _ in pictures]), flags=re.DOTALL)


@pytest.mark.parametrize(
    "found",
    [
        [], few(rows(("dense",), ())), few(rows(("quest",))), few(rows(("dense", "tokenbutler"), (0.25,))),
        few(rows(("quest", "tokenbutler"), (64, 128))),
        [{**r, "error": None} for r in few(rows(("dense", "quest")))],
        [{**r, "attended": None} for r in few(rows(("dense", "quest")))],
        [row("needle", "accuracy", "quest", 0.5, math.nan)], [row("perplexity", "perplexity", "quest", 0.5, math.inf)],
        [row("other task", "other metric", "other policy", 0.5, 3.0)],
        [row("perplexity", "over_dense", "quest", 0.5, 0.0)],
        [row("a", "accuracy", "quest", 0.5, 0.5, where={"x": 1, "y": 2, "z": i}) for i in range(2)],
    ],
    ids="nothing dense one-policy one-budget tokens no-errors no-shares nan inf unknown zero three-coordinates".split(),
)  # fmt: skip
def test_any_part_of_an_evaluation_can_be_written(found, tmp_path):
    written = publishing.write(report(found), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in written)
    assert {"report.md", "report.html"} <= {p.name for p in written}
    links = re.findall(r"\]\((\w+\.png)\)", (tmp_path / "report.md").read_text())
    assert sorted(links) == sorted(p.name for p in written if p.suffix == ".png")


def test_pictures_of_a_former_report_go_and_others_stay(tmp_path):
    publishing.write(report(few(rows())), tmp_path)
    former = {p.name for p in tmp_path.glob("*.png")}
    (tmp_path / "mine.png").write_bytes(b"mine")
    publishing.write(report([r for r in rows() if r["metric"] == "over_dense"]), tmp_path)
    left = {p.name for p in tmp_path.glob("*.png")}
    assert left == {"mine.png", "perplexity_over_dense.png", "hit_rate_heads.png"} and len(former - left) > 1
    (tmp_path / "report.md").write_text("# Notes\n\n![not ours](mine.png)\n")
    publishing.write(report([]), tmp_path)
    assert (tmp_path / "mine.png").exists()


@pytest.fixture(scope="module")
def drawn():
    judged = report()
    return [(f, *render(f.draw, f.name, f.alt)) for f in figures(judged.rows, judged.arrays)]


def test_every_figure_shows_something(drawn):
    import matplotlib.image

    assert {f.name for f, *_ in drawn} == {
        "perplexity", "perplexity_over_dense", "perplexity_js_divergence", "perplexity_top1_agreement",
        "perplexity_bytes_read", "attention_recalled_mass", "needle_accuracy", "key_value_accuracy",
        "variables_accuracy", "lambada_accuracy", "piqa_accuracy", "coreference_miss_rate",
        "coreference_miss_rate_by_distance", "needle_accuracy_grid", "hit_rate_heads"}  # fmt: skip
    for figure, picture, element in drawn:
        assert figure.caption and figure.alt
        assert len(list(ElementTree.fromstring(element).iter())) > 50
        image = matplotlib.image.imread(io.BytesIO(picture))
        assert image.shape[1] == 720
        colours = (255 * image[..., :3]).round().astype(int) @ np.array([65536, 256, 1])
        assert len(np.unique(colours)) > 50


def test_curves_go_through_the_rows():
    found = [r for r in rows() if r["metric"] == "perplexity"]
    (figure,) = figures(found)
    (axes,) = figure.draw().axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    for policy in POLICIES[1:]:
        own = sorted((100 * r["attended"], r["value"]) for r in found if r["policy"] == policy)
        np.testing.assert_allclose(lines[policy].get_xydata(), own)
    np.testing.assert_allclose(lines["dense"].get_ydata(), next(r["value"] for r in found if r["policy"] == "dense"))


@pytest.mark.parametrize("depths", [(0.0, 0.5, 1.0), tuple(i / 10 for i in range(11))])
def test_a_heat_map_names_every_depth_without_overlap(depths):
    lengths = (256, 512)
    found = [row("needle", "accuracy", p, b, 0.5, where={"depth": d, "length": n})
             for p in ("quest", "streaming") for b in (0.5, 0.125) for d in depths for n in lengths]  # fmt: skip
    canvas = figures(found)[0].draw()
    canvas.draw_without_rendering()
    (axes,) = (a for a in canvas.axes if a.get_ylabel() == "depth")
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == [f"{depth:g}" for depth in depths]
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))


def test_a_policy_looks_the_same_everywhere_and_like_no_other():
    seen = {}
    for axes in [axes for figure in figures(rows()) for axes in figure.draw().axes]:
        for line in axes.get_lines():
            seen.setdefault(line.get_label(), set()).add((line.get_color(), line.get_linewidth()))
    assert all(len(seen[policy]) == 1 for policy in POLICIES)
    labels = ("oracle oracle_head random streaming h2o snapkv quest lowrank tokenbutler:a tokenbutler:b tokenbutler:c "
              "tokenbutler:d new newer newest").split()  # fmt: skip
    found = looks(labels)
    assert len({(v.color, v.marker) for v in found.values()}) == len(labels)
    assert min(v.width for k, v in found.items() if k.startswith("tokenbutler")) > max(
        v.width for k, v in found.items() if not k.startswith("tokenbutler")
    )


def test_the_page_needs_nothing_from_outside(drawn):
    whole = page(report(), [(f, element) for f, _, element in drawn])
    found, text = Reader(whole), re.sub(r'"data:image/[^"]*"', '"data:image/"', whole)
    assert "default-src 'none'" in text
    assert not {"script", "link", "img", "iframe", "object"} - {"link"} & set(found.tags)
    assert set(re.findall(r'(?:https?:)?//[^\s"<]+', text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert set(re.findall(r'\b(?:src|href)="([^"#]{1,11})', text)) <= {"data:,", "data:image/"}
    assert len(found.ids) == len(set(found.ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {a or b for a, b in used} <= set(found.ids)
    assert "currentColor" in text and INK not in text


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "report.md").write_text("before")

    def full(self, content):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        publishing.write(report([]), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "before"


def test_without_matplotlib_there_are_tables_and_a_word_about_it(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "plots_available", lambda: False)
    assert [p.name for p in publishing.write(report(), tmp_path)] == ["report.md", "report.html"]
    for name in ("report.md", "report.html"):
        assert "butler-jax" in (tmp_path / name).read_text() and "matplotlib" in (tmp_path / name).read_text()


def test_matplotlib_is_imported_only_to_draw():
    for path in Path(publishing.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not any((n or "").startswith("matplotlib") for n in names), path


CONTRAST = """() => {
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const color = getComputedStyle(e).backgroundColor;
    if (!color.endsWith(', 0)')) return color; } return 'rgb(255, 255, 255)'; };
  const ratio = e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
  const texts = 'body, p, th, td, caption, figcaption, dt, dd, a, pre, .note, .share, .spread';
  return [...document.querySelectorAll(texts)].map(ratio); }"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_reads_well_in_a_browser(browser, tmp_path, scheme, width):
    publishing.write(
        report(base="<b>a base</b> with_a_very_long_name_that_nobody_would_ever_want_to_type_" * 2), tmp_path
    )
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    address = (tmp_path / "report.html").as_uri()
    opened.goto(address)
    opened.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    boxes = opened.eval_on_selector_all("figure svg", "all => all.map(s => s.getBoundingClientRect().toJSON())")
    assert len(boxes) == len(list(tmp_path.glob("*.png")))
    assert all(250 <= box["width"] <= width and box["height"] > 150 for box in boxes)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.get_by_text("The table scrolls sideways.").is_visible() == (width < 768)
    assert min(opened.evaluate(CONTRAST)) > 4.5  # WCAG 2.2, 1.4.3, of all text
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert dark == (scheme == "dark")
    context.close()


def test_a_report_says_which_policies_are_not_in_their_published_form():
    found = dict(facts({"policies": [{"name": "h2o"}, {"name": "snapkv", "observed": 32, "pool": 7}]}))
    assert (
        found["form of policies"]
        == "snapkv: simulated row after row; published as one cut at the end of a dense prompt"
    )
    assert "form of policies" not in dict(facts({"policies": [{"name": "dense"}, {"name": "norm"}]}))
