"""The tables of trials on `tiny` show what their files hold."""

from __future__ import annotations

import pytest

from tests.documentation.pages import DOCS, cell, rows_of

PAGE = (DOCS / "measured" / "trials.md").read_text(encoding="utf-8")


def name_stride(row: dict) -> str:
    return f"{row['stride']}"


def name_rank(row: dict) -> str:
    stored, size = ("int8", 1) if row["score_dtype"] else ("bfloat16", 2)
    return f"{row['rank']} | {stored} | {size * row['rank']}"


def name_training(row: dict) -> str:
    return f"{row['steps']:,} | {row['length']:,}"


@pytest.mark.parametrize(
    ("name", "describe", "count"), [("strides", name_stride, 4), ("ranks", name_rank, 6), ("lengths", name_training, 3)]
)
def test_divergences_under_both_allocations_are_those_of_the_file(name, describe, count):
    found: dict[str, dict[tuple, str]] = {}
    for r in rows_of(f"quality/{name}_tiny.json"):
        if r["metric"] == "js_divergence" and r["task"] == "perplexity" and r["policy"] == "tokenbutler":
            found.setdefault(describe(r), {})[r["allocation"], -r["budget"]] = cell(r, 1000, 2)
    assert len(found) == count
    for begin, cells in found.items():
        assert f"| {begin} | {' | '.join(cells[key] for key in sorted(cells))} |\n" in PAGE, begin


@pytest.mark.parametrize(("name", "weighed"), [("as trained", False), ("weighed", True)])
def test_weighed_errors_are_those_of_the_file(name, weighed):
    rows = [
        r for r in rows_of("quality/weighed_tiny.json") if r["weighed"] == weighed and r["allocation"] == "tolerance"
    ]
    budgets = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
    cells = [
        cell(next(r for r in rows if (r["metric"], r["budget"]) == (metric, budget)), *how)
        for metric, how in (("js_divergence", (1000, 2)), ("over_dense", (100, 1)))
        for budget in budgets
    ]
    assert f"| {name} | {' | '.join(cells)} |\n" in PAGE
