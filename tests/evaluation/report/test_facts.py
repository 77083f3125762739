"""The facts of a report about how it was made."""

from __future__ import annotations

from butler_jax.evaluation.report.facts import list_facts
from butler_jax.policies.snapkv import SnapKV


def test_a_report_says_which_policies_are_not_in_their_published_form():
    found = dict(list_facts({"policies": [{"name": "h2o"}, {"name": "snapkv", "observed": 32, "pool": 7}]}))
    assert found["form of policies"] == f"snapkv: {SnapKV.form}"
    assert "form of policies" not in dict(list_facts({"policies": [{"name": "dense"}, {"name": "norm"}]}))
