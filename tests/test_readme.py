"""The README's tables say what the files behind them say."""

from __future__ import annotations

import re
from pathlib import Path

from butler_jax.policies import POLICIES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_policies_that_differ_from_their_papers_are_marked_in_every_table():
    names = [name for name, policy in POLICIES.items() if policy.form]
    assert names == ["snapkv", "citrus"]
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    marked = [t for t in tables if any(re.search(rf"^\|[^|]*\b{name}\b", t, re.MULTILINE) for name in names)]
    assert len(marked) == 3
    for table in marked:
        assert all(re.search(rf"^\|[^|]*\b{name}`? \u2020", table, re.MULTILINE) for name in names), table
        assert README.split(table)[1].startswith("\n\u2020 Row-by-row form"), table
