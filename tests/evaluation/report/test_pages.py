"""The pages of a report: the same numbers in every form, whatever was evaluated."""

from __future__ import annotations

import html.parser
import math
import re
from pathlib import Path

import pytest

from butler_jax.evaluation.plots import INK, render_figure
from butler_jax.evaluation.report import pages
from butler_jax.evaluation.report.figures import plan_figures
from butler_jax.evaluation.report.pages import render_markdown, render_page
from butler_jax.evaluation.report.report import Report
from butler_jax.evaluation.report.tables import (
    find_metric,
    format_budget,
    make_detail_tables,
    make_tables,
    make_title,
)
from tests.marked import long
from tests.tiny_reports import BUDGETS, POLICIES, few, report, row, rows


class Reader(html.parser.HTMLParser):
    """Tags, words and ids of a page, and its tables: {title: {(policy, column): value}}."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.words, self.tables = [], [], [], {}
        self.into, self.caption, self.columns, self.policy, self.place = None, "", [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "h3":
            self.caption, self.into = "", "caption"
        elif tag == "table":
            self.columns = []
        elif tag == "tr":
            self.policy, self.place = "", 0
        elif tag == "td":
            self.place += 1
        elif tag == "th":
            self.into = "column" if attributes["scope"] == "col" else "policy"
            self.columns += [""] if self.into == "column" else []
        elif tag in ("span", "style"):
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


def test_every_row_is_in_the_page_with_its_value():
    found = rows()
    shown = Reader(render_page(report(found))).tables
    for r in found:
        title = make_title(r["task"], find_metric(r["metric"], [q for q in found if q["metric"] == r["metric"]]))
        policy = r["policy"]
        budgets = BUDGETS if policy == "dense" else (r["budget"],)  # tables of parts have dense at every budget
        if not r["where"]:
            column = {1: "dense", None: "value"}.get(r["budget"]) or format_budget(r["budget"])
            assert shown[title][policy, column] == r["value"]
        elif r["task"] == "needle":
            length, column = r["where"]["length"], f"depth {r['where']['depth']:g}"
            for budget in budgets:
                assert shown[f"{title}, {format_budget(budget)}, length {length}"][policy, column] == r["value"]
        else:
            column = f"distance {r['where']['distance']}".replace("-", "\u2013")
            for budget in budgets:
                assert shown[f"{title}, {format_budget(budget)}"][policy, column] == r["value"]
    assert {v for t in shown.values() for v in t.values()} == {r["value"] for r in found}


def test_markdown_has_the_same_cells():
    text = render_markdown(report())
    for table in (*make_tables(rows()), *make_detail_tables(rows())):
        part = text.split(f" {table.title.replace('|', '')}\n", 1)[1]
        lines = [line for line in part.splitlines() if line.startswith("|")][: 2 + len(table.lines)]
        for line, shown in zip(table.lines, lines[2:], strict=True):
            cells = [c.strip().replace("*", "") for c in shown.strip("|").split("|")]
            want = [f"{c.text} ± {c.spread}" if c else "" for c in line.cells]
            assert cells == [line.policy, *want]


def test_names_are_shown_and_never_run():
    evil = '<script>alert("1")</script>|`*_[x](y)'
    found = [row(task, "accuracy", p, 0.5, 0.5) for task, p in (("needle", evil), ("needle", "quest"), (evil, "quest"))]
    made = report(
        found,
        base=evil,
        command=evil,
        device=evil,
        config={evil: evil},
        versions={evil: evil},
        predictors={evil: evil},
        policies=[{"name": evil, "x": evil}],
    )
    pictures = [(f, render_figure(f.draw, f.name, f.alt)[1]) for f in plan_figures(found)]
    text = render_page(made, pictures)
    assert "script" not in Reader(text).tags and "<script" not in text
    assert sum(evil in word for word in Reader(text).words) > 5
    assert "<script" not in re.sub(r"```.*?```", "", render_markdown(made, pictures), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "found",
    [
        [],
        few(rows(("dense",), ())),
        few(rows(("quest",))),
        few(rows(("dense", "tokenbutler"), (0.25,))),
        few(rows(("quest", "tokenbutler"), (64, 128))),
        [{**r, "error": None} for r in few(rows(("dense", "quest")))],
        [{**r, "attended": None} for r in few(rows(("dense", "quest")))],
        [row("needle", "accuracy", "quest", 0.5, math.nan)],
        [row("perplexity", "perplexity", "quest", 0.5, math.inf)],
        [row("other task", "other metric", "other policy", 0.5, 3.0)],
        [row("perplexity", "over_dense", "quest", 0.5, 0.0)],
        [row("a", "accuracy", "quest", 0.5, 0.5, where={"x": 1, "y": 2, "z": i}) for i in range(2)],
    ],
    ids="nothing dense one-policy one-budget tokens no-errors no-shares nan inf unknown zero three-coordinates".split(),
)
def test_any_part_of_an_evaluation_can_be_written(found, tmp_path):
    written = pages.write_pages(report(found), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in written)
    assert {"report.md", "report.html"} <= {p.name for p in written}
    links = re.findall(r"\]\((\w+\.png)\)", (tmp_path / "report.md").read_text())
    assert sorted(links) == sorted(p.name for p in written if p.suffix == ".png")


@pytest.mark.slow
def test_a_report_is_saved_and_read_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    about = report().about
    made = Report(few(rows()), {}, about)
    assert made.save("~/reports") == tmp_path / "reports" / "report.json"
    assert Report.load("~/reports").rows == Report.load(tmp_path / "reports").rows
    assert not (tmp_path / "~").exists()


def test_pictures_of_a_former_report_go_and_others_stay(tmp_path):
    pages.write_pages(report(few(rows())), tmp_path)
    former = {p.name for p in tmp_path.glob("*.png")}
    (tmp_path / "mine.png").write_bytes(b"mine")
    pages.write_pages(report([r for r in rows() if r["metric"] == "over_dense"]), tmp_path)
    left = {p.name for p in tmp_path.glob("*.png")}
    stay = {"perplexity_over_dense", "hit_rate_heads", "reliability", "distances", "reads_by_head", "reads_by_position"}
    assert left == {"mine.png", *(f"{name}.png" for name in stay)} and len(former - left) > 1
    (tmp_path / "report.md").write_text("# Notes\n\n![not ours](mine.png)\n")
    pages.write_pages(report([]), tmp_path)
    assert (tmp_path / "mine.png").exists()


@pytest.fixture(scope="module")
def drawn():
    made = report()
    return [(f, *render_figure(f.draw, f.name, f.alt)) for f in plan_figures(made.rows, made.arrays)]


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(drawn):
    whole = render_page(report(), [(f, element) for f, _, element in drawn])
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
        pages.write_pages(report([]), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "before"


def test_without_matplotlib_there_are_tables_and_a_word_about_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "plots_available", lambda: False)
    assert [p.name for p in pages.write_pages(report(), tmp_path)] == ["report.md", "report.html"]
    for name in ("report.md", "report.html"):
        assert "butler-jax" in (tmp_path / name).read_text() and "matplotlib" in (tmp_path / name).read_text()


def test_prompts_and_allocations_are_apart_and_in_words():
    def after(prompt, value):
        given = [
            ("oracle", 0.25, "per_head"),
            ("oracle", 0.25, "top_p"),
            ("tokenbutler:per_layer", 0.25, "per_layer"),
        ]
        made = [row("perplexity", "perplexity", "dense", 1, value)]
        for number, (policy, budget, allocation) in enumerate(given, 1):
            for metric in ("perplexity", "over_dense"):
                made.append({**row("perplexity", metric, policy, budget, value + number), "allocation": allocation})
        return [{**r, "prompt_tokens": prompt} for r in made]

    found = [*after(0, 30.0), *after(256, 20.0)]
    text = render_page(report(found), [(f, "<svg></svg>") for f in plan_figures(found)])
    read = Reader(text)
    assert {"task-perplexity-0", "task-perplexity-256"} <= set(read.ids)
    words = " ".join(" ".join(read.words).split())
    for said in (
        "Perplexity without a prompt",
        "Perplexity after a prompt of 256 tokens",
        "There is no prompt: every row of a window is limited.",
        "The first 256 tokens of each document are a prompt. They are read densely and do not count.",
        "The heads of a layer share their budgets",
        "Every head reads the fewest tokens whose estimated attention weights sum to p",
        "Main results after a prompt of 256 tokens",
    ):
        assert said in words, said
    for part, value in zip(text.split('<section id="task-')[1:3], (30.0, 20.0), strict=True):
        table = Reader(part).tables["perplexity"]
        assert table["dense", "dense"] == value and table["oracle", "1/4"] == value + 1
        assert table["oracle:top_p", "1/4"] == value + 2 and table["tokenbutler:per_layer", "1/4"] == value + 3
        assert part.count("<figure>") == 2
    names = [f.name for f in plan_figures(found)]
    assert len(names) == len(set(names)) == 4
    alone = Reader(render_page(report(after(256, 20.0))))
    assert "task-perplexity" in alone.ids and "after a prompt of 256 tokens" in " ".join(alone.words)
    plain = " ".join(Reader(render_page(report([row("perplexity", "perplexity", "oracle", 0.5, 3.0)]))).words)
    assert "Allocations and tails" not in plain


def test_the_title_has_base_and_predictor_and_no_fact_is_empty():
    settings = {
        "budgets": [0.5, 64],
        "run": None,
        "compare": [],
        "data": "",
        "selection": {"sinks": 4, "threshold": None},
    }
    predictors = {p: {"kind": "lookahead", "rank": 16} for p in ("tokenbutler", "tokenbutler:per_layer")}
    made = report(few(rows()), config=settings, notes=["", "a note"], predictors=predictors)
    text = render_page(made)
    assert "<title>Evaluation of a model with a lookahead predictor of rank 16</title>" in text
    assert "<h1>a model with a lookahead predictor of rank 16</h1>" in text
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text, re.DOTALL)
    assert facts and all(name.strip() and value.strip() for name, value in facts)
    assert dict(facts)["selection"] == "sinks 4" and not {"run", "compare", "data"} & {name for name, _ in facts}
    assert sum("training of" in name for name, _ in facts) == 1
    assert not re.search(r"^- [^:]*: *$", render_markdown(made), re.MULTILINE)


CONTRAST = """() => {
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const color = getComputedStyle(e).backgroundColor;
    if (!color.endsWith(', 0)')) return color; } return 'rgb(255, 255, 255)'; };
  const ratio = e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
  const texts = 'body, p, th, td, h3, figcaption, dt, dd, a, pre, .note, .share, .spread';
  return [...document.querySelectorAll(texts)].map(ratio); }"""


LABELS = """() => { const boxes = [...document.querySelectorAll('figure svg')].map(svg => {
  const outer = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(t => {
    const box = t.getBoundingClientRect(), scale = outer.width / svg.viewBox.baseVal.width;
    return { words: t.textContent.trim(), size: parseFloat(getComputedStyle(t).fontSize) * scale, left: box.left,
      right: box.right, top: box.top, bottom: box.bottom }; });
  return { left: outer.left, right: outer.right, bottom: outer.bottom, texts }; });
  return boxes; }"""


def overlap(one, other):
    """Whether two boxes overlap by more than a pixel."""
    wide = min(one["right"], other["right"]) - max(one["left"], other["left"])
    return wide > 1 and min(one["bottom"], other["bottom"]) - max(one["top"], other["top"]) > 1


def check_legends(opened, policies):
    """Legends are large enough to read, inside their figure, and no label is on another one."""
    seen = set()
    for figure in opened.evaluate(LABELS):
        assert all(text["size"] >= 7.5 for text in figure["texts"])
        legend = [
            text for text in figure["texts"] if text["words"] in policies and text["top"] > figure["bottom"] - 250
        ]
        for number, text in enumerate(legend):
            assert text["left"] >= figure["left"] - 1 and text["right"] <= figure["right"] + 1, text
            assert text["size"] >= 9 and not any(overlap(text, other) for other in legend[:number]), text
        seen |= {text["words"] for text in legend if text["size"] >= 10.5}
    assert seen >= set(policies)


@pytest.mark.long  # a narrow page is opened below
@pytest.mark.slow
def test_notes_stay_and_legends_are_readable_on_a_phone(browser, tmp_path):
    found = rows(
        (*POLICIES, "oracle_residual:tolerance", "tokenbutler:lookahead:per_layer"), (0.5, 0.25, 0.125, 64, 128)
    )
    pages.write_pages(report(found), tmp_path)
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    opened = context.new_page()
    opened.goto((tmp_path / "report.html").as_uri())
    opened.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    check_legends(opened, [*POLICIES, "oracle_residual:tolerance", "tokenbutler:lookahead:per_layer"])
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    wide = opened.eval_on_selector_all(".scroll", "all => all.filter(s => s.scrollWidth > s.clientWidth + 50).length")
    assert wide > 3
    opened.eval_on_selector_all(".scroll", "all => all.forEach(s => { s.scrollLeft = 1e6; })")
    notes = opened.eval_on_selector_all(
        "h3, .note", "all => all.filter(n => n.offsetWidth).map(n => n.getBoundingClientRect().toJSON())"
    )
    assert len(notes) > 10 and all(box["left"] >= 0 and box["right"] <= 390 for box in notes)
    context.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme"), [(390, "dark"), long(1280, "light"), long(390, "light"), long(1280, "dark")]
)
def test_the_page_reads_well_in_a_browser(browser, tmp_path, scheme, width):
    pages.write_pages(
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
