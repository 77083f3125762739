"""The tables of the READMEs say what the files behind them say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from butler_jax.policies import POLICIES

REPOSITORY = Path(__file__).parent.parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MEASURED = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
TABLES = [table for text in (README, MEASURED) for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def rows_of(name: str) -> list[dict]:
    return json.loads((REPOSITORY / "benchmarks" / name).read_text())["rows"]


def where(row: dict) -> dict:
    """The part of a task that a row is about; of perplexity, its text."""
    return {} if row["task"] == "perplexity" else row["where"]


def names_policy(table: str, name: str) -> bool:
    return re.search(rf"^\|[^|]*\b{name}\b", table, re.MULTILINE) is not None


def test_policies_that_differ_from_their_papers_are_marked_in_every_table():
    names = [name for name, policy in POLICIES.items() if policy.form]
    assert names == ["snapkv", "citrus"]
    marked = [t for t in TABLES if any(names_policy(t, name) for name in names)]
    assert len(marked) >= 6
    for table in marked:
        assert all(re.search(rf"^\|[^|]*\b{name}`? \u2020", table, re.MULTILINE) for name in names), table
        text = README if table in README else MEASURED
        assert text.split(table)[1].startswith("\n\u2020 Row-by-row form"), table


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
            figures.setdefault(r["policy"], []).append(f"{100 * r['value']:.1f} ± {100 * r['error']:.1f}")
    lines = [line for table in TABLES for line in table.splitlines()]
    for policy, cells in figures.items():
        assert any(line.endswith(f" | {' | '.join(cells)} |") for line in lines), (policy, cells)
    if metric == "over_dense":  # the best of all but the oracles at every budget
        others = [p for p in figures if p not in ("oracle", "oracle_head", "tokenbutler")]
        value = {p: [float(x.split()[0]) for x in f] for p, f in figures.items()}
        assert all(value["tokenbutler"][b] < value[p][b] for p in others for b in range(5))


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
    for label, line in lines.items():
        found = {r["budget"]: r for r in rows if (r["policy"], r["aligned"]) == line}
        cells = [f"{found[b]['perplexity']:.1f} ± {found[b]['perplexity_error']:.1f}" for b in (1 / 2, 1 / 4, 1 / 8)]
        assert f"| {label} | {' | '.join(cells)} |\n" in MEASURED
