"""The README's tables say what the files behind them say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from butler_jax.policies import POLICIES

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_policies_that_differ_from_their_papers_are_marked_in_every_table():
    names = [name for name, policy in POLICIES.items() if policy.form]
    assert names == ["snapkv", "citrus"]
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    marked = [t for t in tables if any(re.search(rf"^\|[^|]*\b{name}\b", t, re.MULTILINE) for name in names)]
    assert len(marked) == 3
    for table in marked:
        assert all(re.search(rf"^\|[^|]*\b{name}`? \u2020", table, re.MULTILINE) for name in names), table
        assert README.split(table)[1].startswith("\n\u2020 Row-by-row form"), table


def test_the_table_beside_kvpress_is_what_was_measured():
    rows = json.loads((REPOSITORY / "benchmarks" / "kvpress.json").read_text())["rows"]
    labels = {"kvpress, SnapKV": "snapkv", "kvpress, H2O": "h2o", "kvpress, StreamingLLM": "streaming"}
    for label, policy in {**labels, "tokenbutler": "tokenbutler"}.items():
        aligned = "kvpress" if label in labels else "decoded, as many read"
        found = {r["budget"]: r["perplexity"] for r in rows if (r["policy"], r["aligned"]) == (policy, aligned)}
        assert f"| {label} | {found[1 / 2]:.1f} | {found[1 / 4]:.1f} | {found[1 / 8]:.1f} |\n" in README
