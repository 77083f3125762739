"""The tables and pictures of the README and of the measured results show the figures of the files behind them."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest

from butler_jax.model import FAMILIES
from butler_jax.policies import POLICIES
from tests.documentation.pages import DOCS, PAGES, REPOSITORY, cell, rows_of, tables

TABLES = [table for page in PAGES for table in tables(page)]

LONG_WINDOWS = "quality/prompted_smollm2_8k.json"
PROMPTED = "quality/prompted_smollm2.json"
ALLOCATIONS = {"per_head": "per head", "per_layer": "per layer", "tolerance": "one tolerance", "top_p": "top-p"}


def where(row: dict) -> dict:
    """The part of a task that a row is about; of perplexity, its text."""
    return {} if row["task"] == "perplexity" else row["where"]


def name_row(policy: str, allocation: str) -> str:
    """The first cell of a row of a table of policies and allocations."""
    name = f"**{policy}**" if policy == "tokenbutler" else policy
    mark = " \u2020" if POLICIES[policy].form else ""
    return f"{name}{mark}, {ALLOCATIONS[allocation]}"


def names_policy(table: str, name: str) -> bool:
    return re.search(rf"^\|[^|]*\b{name}\b", table, re.MULTILINE) is not None


def test_policies_that_differ_from_their_papers_are_marked_in_every_table():
    names = [name for name, policy in POLICIES.items() if policy.form]
    assert names == ["snapkv", "citrus"]
    marked = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for table in tables(page):
            if page.name == "citing.md" or not any(names_policy(table, name) for name in names):
                continue  # that page lists papers
            marked += 1
            assert all(re.search(rf"^\|[^|]*\b{name}`? \u2020", table, re.MULTILINE) for name in names), table
            assert text.split(table)[1].startswith("\n\u2020 Row-by-row form"), table
    assert marked >= 7


@pytest.mark.parametrize(
    ("file", "task", "metric"),
    [
        ("quality/smollm2.json", "perplexity", "over_dense"),
        ("quality/tiny.json", "perplexity", "over_dense"),
        ("quality/smollm2_coreference.json", "coreference", "token_inaccuracy"),
        ("quality/smollm2_downstream.json", "lambada", "accuracy"),
    ],
)
def test_tables_of_policies_are_what_was_measured(file, task, metric):
    """Every policy has a line of its figures, per cent and standard error, in one of the tables."""
    figures: dict[str, list[str]] = {}
    for r in rows_of(file):
        if (r["task"], r["metric"]) == (task, metric) and r["policy"] != "dense" and not where(r):
            figures.setdefault(r["policy"], []).append(cell(r))
    lines = [line for table in TABLES for line in table.splitlines()]
    for policy, cells in figures.items():
        assert any(line.endswith(f" | {' | '.join(cells)} |") for line in lines), (policy, cells)
    if metric == "over_dense":  # the best of all but the oracles at every budget
        others = [p for p in figures if p not in ("oracle", "oracle_head", "tokenbutler")]
        value = {p: [float(x.split()[0]) for x in f] for p, f in figures.items()}
        assert all(value["tokenbutler"][b] < value[p][b] for p in others for b in range(5))


def test_the_table_of_ranks_and_strides_is_what_was_measured():
    found = {}
    for row in rows_of("h200/smollm2_allocations.json"):
        if "allocation" in row:
            shown = f"{row['over_dense_percent']:.1f} ± {row['standard_error']:.1f}"
            found[row["policy"], row["text"], row["allocation"]] = shown
    texts, allocations = ("wikitext2_test", "cbronte_jane"), ("per_head", "per_layer")
    page = (DOCS / "measured" / "trials.md").read_text(encoding="utf-8")
    for run, label in {"r16": "R = 16", "r32": "R = 32", "r32p1": "R = 32, `--stride 1`"}.items():
        cells = [found[run, text, allocation] for text in texts for allocation in allocations]
        assert f"| {label} | {' | '.join(cells)} |\n" in page


def test_the_first_table_of_the_readme_is_what_was_measured():
    found = {}
    for r in rows_of(PROMPTED):
        if (r["metric"], r["sequences"]) == ("over_dense", 16):
            found[r["policy"], r["allocation"], r["text"]] = cell(r)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for label, policy, allocation in (
        ("oracle: the true attention weights, every head its own 1/16", "oracle", "per_head"),
        ("**tokenbutler**, every head its own 1/16", "tokenbutler", "per_head"),
        ("**tokenbutler**, the heads of a layer share", "tokenbutler", "per_layer"),
        ("**tokenbutler**, one tolerance for the model", "tokenbutler", "tolerance"),
        ("lowrank (Loki)", "lowrank", "per_head"),
        ("h2o (H2O)", "h2o", "per_head"),
        ("quest (Quest)", "quest", "per_head"),
        ("streaming (StreamingLLM)", "streaming", "per_head"),
    ):
        cells = [found[policy, allocation, text] for text in ("wikitext2_test", "cbronte_jane")]
        assert f"| {label} | {' | '.join(cells)} |\n" in readme


def test_the_table_of_long_windows_is_what_was_measured():
    page = (DOCS / "measured" / "quality.md").read_text(encoding="utf-8")
    found = {
        (r["text"], r["policy"].split(":")[0], r["allocation"], r["tail"], r["metric"]): r
        for r in rows_of(LONG_WINDOWS)
        if r["budget"] in (1, 1 / 16)
    }
    loss = "{:.1f} ± {:.1f}"
    for text, policy, allocation, tail, metric in found:
        if policy == "dense" or tail or metric != "perplexity":
            continue
        tails = [own for own in (0, 64) if (text, policy, allocation, own, metric) in found]
        divergence, cells = "{:.1f}" if len(tails) > 1 else loss, []
        for metric, scale, form in (
            ("over_dense", 100, loss),
            ("js_divergence", 1000, divergence),
            ("bytes_of_dense", 100, "{:.0f} %"),
        ):
            rows = [found[text, policy, allocation, own, metric] for own in tails]
            cells += [form.format(scale * r["value"], scale * r["error"]) for r in rows]
        assert f"| {name_row(policy, allocation)} | {' | '.join(cells)} |\n" in page


def test_the_tables_of_every_policy_are_what_was_measured():
    page = (DOCS / "measured" / "quality.md").read_text(encoding="utf-8")
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    for r in rows_of(PROMPTED):
        if r["policy"] != "dense" and r["sequences"] == 16:
            found.setdefault((r["text"], r["policy"], r["allocation"]), {})[r["metric"]] = r
    assert len(found) == 26
    for (_, policy, allocation), rows in found.items():
        loss, js, read = rows["over_dense"], rows["js_divergence"], rows["bytes_of_dense"]
        cells = [cell(loss), cell(js, 1000), f"{100 * loss['attended']:.1f} %"]
        line = f"| {name_row(policy, allocation)} | {' | '.join(cells)} | {100 * read['value']:.0f} % |\n"
        assert line in page, line


def test_the_tables_of_every_budget_are_what_was_measured():
    page = (DOCS / "measured" / "quality.md").read_text(encoding="utf-8")
    found: dict[tuple[str, ...], dict[float, str]] = {}
    for r in rows_of(PROMPTED):
        scale = {"over_dense": 100, "js_divergence": 1000}.get(r["metric"])
        if scale and r["sequences"] == 4 and (r["metric"], r["text"]) != ("js_divergence", "cbronte_jane"):
            cells = found.setdefault((r["metric"], r["text"], r["policy"], r["allocation"]), {})
            cells[r["budget"]] = cell(r, scale)
    assert len(found) == 33
    for (_, _, policy, allocation), cells in found.items():
        row = " | ".join(cells[b] for b in (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 64, 128, 256, 512))
        assert f"| {name_row(policy, allocation)} | {row} |\n" in page, (policy, allocation)


@pytest.mark.parametrize(
    ("text", "budgets"), [("wikitext2_test", (1 / 8, 1 / 16, 1 / 32)), ("cbronte_jane", (1 / 16,))]
)
def test_the_tables_of_the_tail_are_what_was_measured(text, budgets):
    page = (DOCS / "measured" / "quality.md").read_text(encoding="utf-8")
    found: dict[tuple[str, str], dict[tuple, str]] = {}
    for r in rows_of("quality/tail_smollm2.json"):
        plain = not r.get("interval") and not r.get("score_dtype")
        if (r["metric"], r["text"]) == ("over_dense", text) and plain:
            found.setdefault((r["policy"], r["allocation"]), {})[r["budget"], r["tail"]] = cell(r)
    assert len(found) == (8 if len(budgets) == 3 else 3)
    for (policy, allocation), cells in found.items():
        row = " | ".join(cells[budget, tail] for budget in budgets for tail in (0, 64))
        assert f"| {name_row(policy, allocation)} | {row} |\n" in page, (policy, allocation)


def test_the_table_of_long_windows_at_other_budgets_is_what_was_measured():
    page = (DOCS / "measured" / "quality.md").read_text(encoding="utf-8")
    found = {(r["policy"], r["budget"], r["metric"]): r for r in rows_of(LONG_WINDOWS)}
    for policy in ("oracle", "tokenbutler"):
        metrics = {"over_dense": 100, "js_divergence": 1000}.items()
        cells = [cell(found[policy, b, m], s, n) for b, n in ((1 / 64, 1), (1 / 4, 2)) for m, s in metrics]
        assert f"| {name_row(policy, 'per_head')} | {' | '.join(cells)} |\n" in page, policy


def test_the_table_of_pages_is_what_was_measured():
    page = (DOCS / "measured" / "quality.md").read_text(encoding="utf-8")
    found: dict[tuple, dict[int, str]] = {}
    for r in rows_of("quality/pages_smollm2.json"):
        if r["metric"] == "over_dense":
            found.setdefault((r["policy"], r["allocation"], r["budget"]), {})[r["page_tokens"]] = cell(r)
    assert len(found) == 8
    for (policy, allocation, budget), cells in found.items():
        row = " | ".join(cells[size] for size in (1, 2, 4, 8, 16))
        assert f"| {name_row(policy, allocation)} | 1/{round(1 / budget)} | {row} |\n" in page, (policy, allocation)


def test_the_table_of_summed_pages_is_what_was_measured():
    page, found = (DOCS / "measured" / "trials.md").read_text(encoding="utf-8"), {}
    for metric, scale in (("over_dense", 100), ("js_divergence", 1000)):
        for r in rows_of("quality/pages_smollm2.json") + rows_of("quality/pages_sum_smollm2.json"):
            if r["metric"] == metric and r["page_tokens"] in (4, 16):
                key = r["policy"], r["allocation"], r["budget"], r["page_tokens"]
                found.setdefault(key, []).append(cell(r, scale))
    for (policy, allocation, budget, size), cells in found.items():
        row = f"{name_row(policy, allocation)} | 1/{round(1 / budget)} | {size} | {' | '.join(cells)}"
        assert f"| {row} |\n" in page, row


def test_the_table_of_top_p_is_what_was_measured():
    page = (DOCS / "measured" / "trials.md").read_text(encoding="utf-8")
    for metric, scale, digits in (("over_dense", 100, 1), ("js_divergence", 1000, 2)):
        found: dict[tuple[str, str], list[str]] = {}
        for r in rows_of("quality/top_p_tiny.json"):
            if r["metric"] == metric and r["policy"] != "dense":
                found.setdefault((r["policy"].split(":")[0], r["allocation"]), []).append(cell(r, scale, digits))
        assert len(found) == 8 and all(len(cells) == 3 for cells in found.values())
        for (policy, allocation), cells in found.items():
            assert f"| {name_row(policy, allocation)} | {' | '.join(cells)} |\n" in page, (policy, allocation, cells)


def test_the_table_beside_kvpress_is_what_was_measured():
    rows = rows_of("kvpress.json")
    ours, once = "decoded, as many read", "chosen once, at its end"
    lines = {
        "kvpress, SnapKV": ("snapkv", "kvpress"),
        "our SnapKV, chosen once": ("snapkv", once),
        "kvpress, H2O": ("h2o", "kvpress"),
        "our H2O, chosen once": ("h2o", once),
        "kvpress, StreamingLLM": ("streaming", "kvpress"),
        "**tokenbutler**": ("tokenbutler", ours),
    }
    page = (DOCS / "measured" / "kvpress.md").read_text(encoding="utf-8")
    for label, line in lines.items():
        found = {r["budget"]: r for r in rows if (r["policy"], r["aligned"]) == line}
        cells = [f"{found[b]['perplexity']:.1f} ± {found[b]['perplexity_error']:.1f}" for b in (1 / 2, 1 / 4, 1 / 8)]
        assert f"| {label} | {' | '.join(cells)} |\n" in page


def test_decoding_speeds_are_what_was_measured():
    rows = rows_of("smollm2_decoding.json")
    page = (DOCS / "measured" / "decoding.md").read_text(encoding="utf-8")
    labels = {
        ("transformers", 1.0, 1): "transformers, dense",
        ("dense", 1.0, 1): "dense",
        ("sparse", 0.25, 1): "1/4, every step chooses",
        ("sparse", 0.25, 8): "1/4, every 8th step",
        ("sparse", 0.0625, 1): "1/16, every step chooses",
        ("sparse", 0.0625, 8): "1/16, every 8th step",
    }
    for key, label in labels.items():
        own = sorted((r for r in rows if (r["variant"], r["budget"], r["interval"]) == key), key=lambda r: r["context"])
        cells = [f"{r['tokens_per_second']:.1f}" for r in own]
        assert f"| {label} | {' | '.join(cells)} |\n" in page


def test_the_tables_of_the_model_of_gpus_are_those_of_its_file():
    found = json.loads((REPOSITORY / "benchmarks" / "gpu_model.json").read_text())
    page = (DOCS / "measured" / "decoding.md").read_text(encoding="utf-8")
    for row in found["compared"]:
        pairs = [f"{row[part][0]:.1f}, {row[part][1]:.1f}" for part in ("dense", "reuse", "predict")]
        assert f"| {row['context']:,} | {row['batch']} | {row['pooling']} | {' | '.join(pairs)} |\n" in page
    lines: dict[tuple, list[dict]] = {}
    for row in found["rows"]:
        lines.setdefault((row["batch"], row["interval"], row["context"]), []).append(row)
    for (batch, interval, context), rows in lines.items():
        tokens = (r for r in rows if r["unit"] == 1)
        calls = {(r["chip"], r["pooling"], r["together"]): (f"{r['speedup']:.2f}x", r["share_of_cap"]) for r in tokens}
        cells = [calls[chip, "normalised", 2][0] for chip in ("a100", "h100", "h200", "b200")]
        best, of_best = calls["h200", "maximum", 2]
        cells += [
            f"{calls['h200', 'normalised', 2][1]:.0%}".replace("%", " %"),
            f"{best}, {of_best:.0%}".replace("%", " %"),
            *(calls["h200", "normalised", together][0] for together in (4, 1)),
        ]
        assert f"| {batch} | {interval} | {context:,} | {' | '.join(cells)} |\n" in page
    for (batch, interval, context), rows in lines.items():
        of_pages = {(r["pooling"], r["unit"]): r for r in rows if (r["chip"], r["together"]) == ("h200", 2)}
        both = [of_pages[pooling, unit] for pooling in ("normalised", "maximum") for unit in (1, 4, 16)]
        cells = [f"{r['speedup']:.2f}x, {r['share_of_cap']:.0%}".replace("%", " %") for r in both]
        assert interval != 1 or f"| {batch} | {context:,} | {' | '.join(cells)} |\n" in page


def test_seconds_of_notebooks_are_what_was_measured():
    found = json.loads((REPOSITORY / "benchmarks" / "notebooks.json").read_text())["notebooks"]
    assert set(found) == {path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb")}
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    for name, row in found.items():
        assert f"notebooks/{name}>` | {row['computing']:.0f} |" in page, name


def test_counts_of_broken_inputs_are_what_was_given():
    found = json.loads((REPOSITORY / "benchmarks" / "fuzz.json").read_text())
    assert found["findings"] == 0 and found["atheris"]["findings"] == []
    given = f"{found['inputs']:,} broken inputs"
    more = f"atheris {sum(found['atheris']['runs'].values()) / 1e6:.1f} million more"
    for page in ("measured/robustness.md", "guides/security.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        assert given in text and more in text, page
    assert given in (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_pictures_are_what_their_code_draws():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name in ("pipeline", "quality"):
        assert getattr(draw, name)() == (DOCS / f"{name}.svg").read_text(encoding="utf-8"), "run python docs/draw.py"


def test_the_readme_has_about_1200_words():
    words = re.findall(r"\w[\w'./-]*", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert len(words) < 1500


def test_links_of_pages_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_links_within_pages_lead_to_headings():
    def headings(page):
        lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}

    known = {page.resolve(): headings(page) for page in PAGES}
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve() if target else page.resolve()
            assert heading in known.get(place, {heading}), (page, target, heading)


def test_the_version_is_the_same_wherever_it_is_written():
    (version,) = re.findall(r'^version = "(.*)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (DOCS / "citing.md").read_text()
    assert f"butler_jax-{version}-py3" in (DOCS / "install.md").read_text()


def test_the_seconds_of_starts_are_those_of_the_file():
    text = (DOCS / "install.md").read_text()
    for row in rows_of("starts.json"):
        first, second = (f"{row[start]['seconds']:.1f} s" for start in ("first", "second"))
        assert re.search(rf"{re.escape(row['program'])}\b[^,]*? {first}[^,]*? and {second}", text), row


@pytest.mark.parametrize("page", ["README.md", "docs/guides/train.md"])
def test_the_pages_name_every_family(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (named,) = re.findall(r"families are ([a-z0-9_, ]+) and ([a-z0-9_]+)\.", text)
    assert {*named[0].split(", "), named[1]} == set(FAMILIES)


def test_the_tables_of_families_are_what_was_measured():
    measured = json.loads((REPOSITORY / "benchmarks" / "families.json").read_text(encoding="utf-8"))
    families, real, gemma = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        for table in tables(DOCS / "measured" / "families.md")
    )
    tiny = {row["model"]: row for row in measured["tiny"]}
    assert {row["family"] for row in measured["tiny"]} == set(FAMILIES) == {row[0] for row in families}
    for family, model, deviation, largest in families:
        assert tiny[model]["family"] == family
        assert (deviation, largest) == (f"{tiny[model]['deviation']:.1e}", f"{tiny[model]['largest_logit']:.1f}")
        share = tiny[model]["deviation"] / tiny[model]["largest_logit"]
        own = [row for row in measured["tiny"] if row["family"] == family]
        assert share == max(row["deviation"] / row["largest_logit"] for row in own) < 1e-5
    for (_, model, tokens, ours, theirs), row in zip(real, measured["real"], strict=True):
        assert (model, tokens) == (row["model"], f"{row['tokens']:,}")
        assert (ours, theirs) == (f"{row['perplexity']:.4f}", f"{row['transformers']:.4f}")
        assert row["relative"] < 1e-3
    rows = {
        (row["policy"], row["budget"]): row
        for row in rows_of("quality/gemma3_270m.json")
        if row["metric"] == "over_dense"
    }
    for policy, *cells in gemma:
        found = [rows[policy, budget] for budget in (0.25, 0.0625)]
        assert cells == [f"+{100 * row['value']:.1f} ± {100 * row['error']:.1f}" for row in found]
