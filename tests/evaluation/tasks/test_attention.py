"""The rows of the task attention."""

from __future__ import annotations

from types import SimpleNamespace

from butler_jax.evaluation.tasks import attention
from butler_jax.policies import make_policy
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Recall
from butler_jax.simulation.statistics import Estimate


def test_ties_have_a_row_where_they_are_more_than_one_in_a_hundred(monkeypatch):
    shares = {0.5: 0.004, 0.25: 0.02}
    by_budget = {name: {b: Estimate(share, None, 9, 1) for b, share in shares.items()} for name in ("mass", "tied")}
    read = {b: Estimate(b, None, 9, 1) for b in shares}
    found = Recall({"quest": by_budget["mass"]}, {"quest": read}, {}, {}, {"quest": by_budget["tied"]}, {})
    monkeypatch.setattr(attention, "measure_recall", lambda *_, **__: found)
    task = object.__new__(attention.AttentionTask)
    task.base, task.batches = SimpleNamespace(model=None), []
    task.config = SimpleNamespace(attention_rows=None, score_dtype=None, prompt_tokens=0)
    task.make_row = lambda policy, metric, estimate, budget, attended: (metric, budget, estimate.value, attended)
    policy = SimpleNamespace(policy=make_policy("quest"), predictor=None)
    rows = task.evaluate(policy, {b: SelectionConfig(budget=b) for b in shares}).rows
    assert [row for row in rows if row[0] == "tied"] == [("tied", 0.25, 0.02, 0.25)]
    assert len([row for row in rows if row[0] == "recalled_mass"]) == 2
