"""Tables of a report: policies down, budgets across, values in their unit."""

from __future__ import annotations

import math

import pytest

from butler_jax.evaluation.report.tables import (
    find_metric,
    format_budget,
    make_tables,
    sort_budgets,
)
from tests.tiny_reports import row


def test_tables_have_policies_down_and_budgets_across():
    found = [
        row("needle", "accuracy", p, b, v)
        for p, b, v in (("dense", 1, 0.9), ("oracle", 0.5, 0.8), ("oracle", 64, 0.7), ("quest", 0.5, 0.6))
    ]
    (table,) = make_tables(found)
    assert table.title == "needle: accuracy (%)"
    assert [c.label for c in table.columns] == ["dense", "1/2", "64 tokens"]
    assert [(line.policy, [c and c.value for c in line.cells]) for line in table.lines] == [
        ("dense", [0.9, None, None]),
        ("oracle", [None, 0.8, 0.7]),
        ("quest", [None, 0.6, None]),
    ]


def test_values_are_shown_in_their_unit():
    for metric, value, error, text, spread in (
        ("perplexity", 29.2041, 0.61, "29.204", "0.610"),
        ("over_dense", -0.0004, 0.00094, "\u22120.04", "0.09"),
        ("accuracy", 0.9731, 0.0042, "97.3", "0.4"),
        ("bytes_read", 3 * 2**20, None, "3.00", ""),
    ):
        (table,) = make_tables([row("perplexity", metric, "quest", 0.5, value, error)])
        assert (table.lines[0].cells[0].text, table.lines[0].cells[0].spread) == (text, spread), metric
    assert find_metric("bytes_read", [{"value": 900.0}]).unit == "B"


def test_an_accuracy_of_0_or_100_says_what_its_error_is():
    notes = [make_tables([row("needle", "accuracy", "quest", 0.5, v, 0.04)])[0].note for v in (0.0, 1.0, 0.5)]
    assert ["the length of the Wilson interval, 1 / (samples + 1)" in note for note in notes] == [True, True, False]
    assert "Wilson" not in make_tables([row("perplexity", "top1_agreement", "quest", 0.5, 1.0)])[0].note


def test_budgets_are_written_as_they_are_given():
    assert [format_budget(b) for b in (0.5, 1 / 3, 0.0625, 0.3, 0.75, 1024, None)] == [
        "1/2",
        "1/3",
        "1/16",
        "0.3",
        "0.75",
        "1,024 tokens",
        "",
    ]
    assert sort_budgets([row("x", "y", "quest", b, 1.0) for b in (0.125, 64, 0.5)]) == [0.5, 64, 0.125]


@pytest.mark.parametrize(
    "metric, best", [("accuracy", "quest"), ("miss_rate", "streaming"), ("effective_sparsity", None)]
)
def test_the_best_that_is_no_reference_stands_out(metric, best):
    values = {"dense": 0.1, "oracle": 0.99, "oracle_head": 0.01, "quest": 0.8, "streaming": 0.2, "random": math.nan}
    (table,) = make_tables([row("x", metric, p, 1 if p == "dense" else 0.5, v) for p, v in values.items()])
    assert [line.policy for line in table.lines if any(c and c.best for c in line.cells)] == ([best] if best else [])


def test_a_column_says_what_was_read():
    found = [row("needle", "accuracy", p, 0.125, 0.5, attended=a) for p, a in (("oracle", 0.16), ("quest", 0.144))]
    assert make_tables(found)[0].columns[0].share == "14.4\u201316.0 % read"
    assert make_tables(found[:1])[0].columns[0].share == "16.0 % read"
