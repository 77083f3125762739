"""The main results follow from the rows."""

from __future__ import annotations

from butler_jax.evaluation.report.summary import make_summary_lines, summarise
from butler_jax.evaluation.report.tables import (
    make_tables,
)
from tests.tiny_reports import row


def test_the_main_result_follows_from_the_rows():
    over = {"oracle": 0.01, "tokenbutler": 0.02, "quest": 0.3, "random": 0.9}
    found = [row("perplexity", "perplexity", "dense", 1, 20.0, None)]
    found += [row("perplexity", "over_dense", p, 0.125, v, None) for p, v in over.items()]
    found += [row("needle", "accuracy", p, 0.125, v, None) for p, v in (("tokenbutler", 0.5), ("random", 0.6))]
    said = " ".join(summarise(found)).replace("\u00a0", " ")
    assert "perplexity is 20.000." in said
    layers = "of the cache in the layers after the first"
    assert f"Reading 16.0 % {layers} (budget 1/8), tokenbutler is 2.00 % above it, and quest, the best" in said
    assert "better value in 1 of the 2 comparisons" in said
    text, needle = make_summary_lines(found)
    assert [c.replace("\u00a0", " ") for c in text.cells] == ["+2.00 %", "quest +30.00 %", "+1.00 %", ""]
    assert text.butler_leads and not needle.butler_leads


def test_the_main_result_says_how_many_bytes_are_read_for_it():
    over = {"oracle": 0.01, "tokenbutler": 0.02, "quest": 0.3, "random": 0.9}
    read = {"oracle": 0.4, "tokenbutler": 0.45, "quest": 0.56, "random": 0.41}
    found = [row("perplexity", "perplexity", "dense", 1, 20.0, None)]
    found += [row("perplexity", "over_dense", p, 0.125, v, None) for p, v in over.items()]
    found += [row("perplexity", "bytes_of_dense", p, 0.125, v, 1e-4) for p, v in read.items()]
    said = " ".join(summarise(found)).replace("\u00a0", " ")
    assert (
        "tokenbutler is 2.00 % above it (45.0 % of the bytes that dense reads in all layers, those for its choice"
        in said
    )
    assert "quest, the best other policy, 30.00 % above (56.0 % of the bytes)." in said
    assert "better value in 1 of the 1 comparisons" in said
    cells = [c.replace("\u00a0", " ") for c in make_summary_lines(found)[1].cells]
    assert cells == ["45.0 %", "quest 56.0 %", "40.0 %", "100.0 %"]
    note = make_tables(found)[1].note
    assert "% read: of the keys, in the layers after the first" in note
