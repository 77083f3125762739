"""The rows of the task attention."""

from __future__ import annotations

from types import SimpleNamespace

from butler_jax.evaluation.contenders import EvaluatedPolicy
from butler_jax.evaluation.tasks import attention
from butler_jax.policies import make_policy
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Recall
from butler_jax.simulation.statistics import Estimate


def make_task() -> attention.AttentionTask:
    task = object.__new__(attention.AttentionTask)
    task.base, task.batches = SimpleNamespace(model=None), []
    task.config = SimpleNamespace(attention_rows=None, score_dtype=None, prompt_tokens=0)
    task.expected, task.found = [], {}
    return task


def test_ties_have_a_row_where_they_are_more_than_one_in_a_hundred(monkeypatch):
    shares = {0.5: 0.004, 0.25: 0.02}
    by_budget = {name: {b: Estimate(share, None, 9, 1) for b, share in shares.items()} for name in ("mass", "tied")}
    read = {b: Estimate(b, None, 9, 1) for b in shares}
    found = Recall({"quest": by_budget["mass"]}, {"quest": read}, {}, {}, {"quest": by_budget["tied"]}, {}, {}, {})
    monkeypatch.setattr(attention, "measure_recall", lambda *_, **__: found)
    task = make_task()
    task.make_row = lambda policy, metric, estimate, budget, attended: (metric, budget, estimate.value, attended)
    policy = EvaluatedPolicy("quest", make_policy("quest"))
    rows = task.evaluate(policy, {b: SelectionConfig(budget=b) for b in shares}).rows
    assert [row for row in rows if row[0] == "tied"] == [("tied", 0.25, 0.02, 0.25)]
    assert len([row for row in rows if row[0] == "recalled_mass"]) == 2


def test_expected_policies_share_a_pass_with_at_most_one_predictor(monkeypatch):
    """Two of one name, other selections and another predictor need a further pass."""
    passes = []

    def measure(model, predictor, batches, policies, budgets, **options):
        passes.append((predictor, [policy.name for policy in policies]))
        return Recall({policy.name: {} for policy in policies}, {}, {}, {}, {}, {}, {}, {})

    monkeypatch.setattr(attention, "measure_recall", measure)
    task = make_task()
    given = [
        ("oracle", "oracle", None),
        ("tokenbutler", "tokenbutler", "first"),
        ("quest:page=8", "quest:page=8", None),
        ("quest:page=16", "quest:page=16", None),
        ("tokenbutler:other", "tokenbutler", "second"),
    ]
    policies = [EvaluatedPolicy(label, make_policy(name), predictor) for label, name, predictor in given]
    selections = {0.5: SelectionConfig(budget=0.5)}
    wider = {0.5: SelectionConfig(budget=0.5, allocation="per_layer")}
    cells = [(policy, selections) for policy in policies] + [(EvaluatedPolicy("h2o", make_policy("h2o")), wider)]
    task.evaluate(*cells[0])
    assert passes == [(None, ["oracle"])]  # nothing was expected
    task.expect(cells)
    for cell in cells:
        task.evaluate(*cell)
    assert passes[1:] == [
        ("first", ["oracle", "tokenbutler", "quest"]),
        ("second", ["quest", "tokenbutler"]),
        (None, ["h2o"]),
    ]
    assert not task.found and not task.expected
