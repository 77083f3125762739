"""The command `bench` times every variant that was asked for, in one process."""

from __future__ import annotations

import json

import pytest

from butler_jax.cli import decoding_rounds
from butler_jax.cli.bench import main
from butler_jax.cli.bench_config import BenchConfig
from butler_jax.decoding import make_plan
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig
from butler_jax.weights import load_base


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


def test_the_steps_that_are_timed_are_those_of_generate(monkeypatch):
    """The default predictor has an offset, which decides how scores are pooled."""
    base, made = load_base("tiny"), []
    predictor = make_predictor(base.config, PredictorConfig(rank=4))
    monkeypatch.setattr(
        decoding_rounds, "make_plan", lambda *given, **how: made.append(make_plan(*given, **how)) or made[-1]
    )
    config = BenchConfig(contexts="64", budgets="1/4", intervals="1", tokens=2, rounds=1)
    decoding_rounds.measure(config, base, predictor, None, 64)
    selection = SelectionConfig(budget=1 / 4)
    own = make_plan(base.config, 64, selection, make_policy("tokenbutler"), predictor=predictor)
    assert made[-1].policy == own.policy and own.policy.offset == "share"
