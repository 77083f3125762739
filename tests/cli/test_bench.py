"""The command `bench` times every variant that was asked for, in one process."""

from __future__ import annotations

import json

import pytest

from butler_jax.cli.bench import main


@pytest.mark.slow
def test_every_budget_interval_and_tail_is_timed_beside_dense(tmp_path, capsys):
    words = "--base tiny --contexts 64,9999 --budgets 1/4,20 --intervals 1,2 --tail 8 --tokens 2 --rounds 1 --no-peer"
    assert main([*words.split(), "--json", str(tmp_path / "found" / "bench.json")]) == 0
    found = json.loads((tmp_path / "found" / "bench.json").read_text())
    rows = [(row["variant"], row["budget"], row["interval"], row["tail"]) for row in found["rows"]]
    asked = [("sparse", budget, interval, tail) for budget in (0.25, 20) for interval in (1, 2) for tail in (0, 8)]
    assert rows == [("dense", 1.0, 1, 0), *asked]
    assert all(row["seconds"] > 0 and row["context"] == 64 for row in found["rows"])
    said = capsys.readouterr().out
    assert "9999 tokens are beyond the model's context of 2048: left out" in said
    assert said.count(" tail 8") == 4
