"""The main results follow from the rows."""

from __future__ import annotations

import dataclasses

import pytest

from butler_jax.evaluation.report.summary import count_leads, make_summary_lines, summarise
from butler_jax.evaluation.report.tables import make_tables
from butler_jax.policies.oracle import Oracle
from tests.tiny_reports import row

LAYERS = "of the keys read, layer 0 aside"


def said(found):
    return [sentence.replace("\u00a0", " ") for sentence in summarise(found)]


def make_rows(over, error=None):
    """Dense, and rows of perplexity: over {(policy, budget): (excess over dense, share of dense's bytes)}."""
    found = [row("perplexity", "perplexity", "dense", 1, 20.0, 0.5)]
    for (policy, budget), (value, read) in over.items():
        found.append(row("perplexity", "over_dense", policy, budget, value, error))
        found.append(row("perplexity", "bytes_of_dense", policy, budget, read, 1e-4))
    return found


def test_the_main_result_follows_from_the_rows():
    over = {"oracle": 0.01, "tokenbutler": 0.02, "quest": 0.3, "random": 0.9}
    found = [row("perplexity", "perplexity", "dense", 1, 20.0, None)]
    found += [row("perplexity", "over_dense", p, 0.125, v, None) for p, v in over.items()]
    found += [row("needle", "accuracy", p, 0.125, v, None) for p, v in (("tokenbutler", 0.5), ("random", 0.6))]
    assert said(found) == [
        "The dense model has a perplexity of 20.000.",
        f"At the smallest budget, 1/8 (16.0 % {LAYERS}), tokenbutler is 2.00 % above dense, ahead of all other "
        "policies; the next is quest, 30.00 % above dense; the attention oracle is 1.00 % above dense.",
    ]
    text, needle = lines = make_summary_lines(found)
    assert [c.replace("\u00a0", " ") for c, _ in text.cells] == ["+2.00 %", "quest +30.00 %", "+1.00 %", ""]
    assert text.butler_leads and not needle.butler_leads
    assert "in 1 of the 2 lines." in count_leads(lines)


def test_the_dense_perplexity_has_its_prompt_and_windows():
    dense = {**row("perplexity", "perplexity", "dense", 1, 20.0, 0.5), "sequences": 4, "unit": "windows"}
    found = said([{**dense, "prompt_tokens": 256}])
    assert found == ["The dense model has a perplexity of 20.000 ± 0.500 over 4 windows, after a prompt of 256 tokens."]


@pytest.mark.parametrize(
    ("streaming", "quest", "end"),
    [
        (
            (0.30, 0.40),
            (0.50, 0.43),
            "merely ties streaming at 1/4: streaming at 1/4 is 30.00 ± 2.00 % above dense for 40.0 %, "
            "tokenbutler 29.00 ± 2.00 % above dense.",
        ),
        (
            (0.28, 0.40),
            (0.20, 0.42),
            "is behind quest at 1/4 and merely ties streaming at 1/4: quest at 1/4 is 20.00 ± 2.00 % above dense for "
            "42.0 %, tokenbutler 29.00 ± 2.00 % above dense.",
        ),
        (
            (0.50, 0.40),
            (0.20, 0.44),
            "is ahead of all other policies that read no more; the next is streaming at 1/4 (40.0 %), "
            "50.00 ± 2.00 % above dense.",
        ),
        ((0.30, 0.44), (0.20, 0.44), "has no rival: no other policy with a finite perplexity reads as few."),
    ],
    ids="tie behind ahead alone".split(),
)
def test_the_comparison_in_bytes_is_said_as_it_is(streaming, quest, end):
    over = {("tokenbutler", 1 / 16): (0.29, 0.43), ("tokenbutler", 1 / 4): (0.05, 0.58), ("oracle", 1 / 4): (0.01, 0.1)}
    over |= {("streaming", 1 / 4): streaming, ("quest", 1 / 4): quest}
    found = make_rows(over, 0.02)
    head = "In bytes, tokenbutler at 1/16 (43.0 % of what dense reads, all layers and its choice counted) "
    assert said(found)[2] == head + end


def test_a_perplexity_that_is_not_finite_is_named():
    over = {("tokenbutler", 1 / 8): (-0.1, 0.3), ("streaming", 1 / 8): (float("inf"), 0.2)}
    _, _, bytes_read, last = said(make_rows(over))
    assert bytes_read.endswith("has no rival: no other policy with a finite perplexity reads as few.")
    assert last == "The perplexity of streaming is not finite."


def test_a_bound_of_ones_own_is_never_the_best():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Oracle):
        name = "of_mine"

    over = {("of_mine", 1 / 8): (0.01, 0.4), ("streaming", 1 / 8): (0.29, 0.4)}
    assert ", streaming is 29.00 % above dense" in said(make_rows(over))[1] and Mine.is_bound


def test_a_tie_at_the_smallest_budget_is_no_lead():
    over = {("tokenbutler", 1 / 8): (0.30, 0.4), ("quest", 1 / 8): (0.31, 0.4), ("streaming", 1 / 8): (0.29, 0.4)}
    assert said(make_rows(over, 0.03))[1] == (
        f"At the smallest budget, 1/8 (16.0 % {LAYERS}), streaming is 29.00 ± 3.00 % above dense; "
        "tokenbutler and quest tie with it."
    )


def test_equal_values_are_no_lead():
    found = [row("piqa", "accuracy", p, 0.125, 0.5) for p in ("tokenbutler", "quest")]
    (line,) = lines = make_summary_lines(found)
    assert line.butler_leads is None and "in 0 of the 1 lines, and an equal one in 1" in count_leads(lines)


def test_an_oracle_with_a_tail_is_named():
    found = make_rows({("oracle:tail=16", 0.125): (0.01, 0.4), ("streaming", 0.125): (0.3, 0.4)})
    assert said(found)[1].endswith("the attention oracle (oracle:tail=16) is 1.00 % above dense.")
    (line,) = make_summary_lines(found)
    assert line.oracle.replace("\u00a0", " ") == "tail=16 +1.00 %"


def test_lines_say_how_many_bytes_are_read():
    over = {("oracle", 0.125): (0.01, 0.4), ("tokenbutler", 0.125): (0.02, 0.45), ("quest", 0.125): (0.3, 0.56)}
    found = make_rows(over)
    (line,) = make_summary_lines(found)
    assert [read.replace("\u00a0", " ") for _, read in line.cells] == [
        "45.0 % of bytes",
        "56.0 % of bytes",
        "40.0 % of bytes",
        "",
    ]
    assert "% read: of the keys, in the layers after the first" in make_tables(found)[1].note
