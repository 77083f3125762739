"""Every policy runs under the allocations that its scores allow, at one mean."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from butler_jax.evaluation import allocations, evaluate
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.contenders import EvaluatedPolicy
from butler_jax.policies import make_policy
from butler_jax.selection import SelectionConfig
from tests.tiny_evaluations import make_perplexity_evaluation
from tests.tiny_models import make_model


def test_policies_run_under_the_allocations_that_their_scores_allow(monkeypatch):
    asked, said = [], []

    def calibrate(model, predictor, windows, selection, means, **how):
        asked.append((how["policy"].name, selection.allocation))
        return [dataclasses.replace(selection, tolerance=0.1)] * len(means)

    monkeypatch.setattr(allocations, "calibrate_tolerance", calibrate)
    monkeypatch.setattr(allocations, "read_windows", lambda *given: [])
    names = ("dense", "oracle", "quest", "streaming", "oracle_residual")
    policies = [EvaluatedPolicy(name, make_policy(name)) for name in names]
    policies.append(EvaluatedPolicy("tokenbutler", make_policy("tokenbutler", offset="share")))
    config = EvalConfig(allocations="per_head,top_p,tolerance", budgets="1/4,64")

    class Anything:
        model = None

    found = list(allocations.allocate_policies(policies, Anything, config, "", print, said.append))
    assert said == [
        *(f"finding p of each budget for {name}:top_p" for name in ("oracle", "quest")),
        *(f"finding the tolerance of each budget for {name}:tolerance" for name in ("oracle_residual", "tokenbutler")),
    ]
    assert [one.label for one in found] == [
        *("dense", "oracle", "oracle:top_p", "quest", "quest:top_p", "streaming"),
        *("oracle_residual", "oracle_residual:tolerance", "tokenbutler", "tokenbutler:tolerance"),
    ]
    assert asked == [
        *(("oracle", "top_p"), ("quest", "top_p")),
        *(("oracle_residual", "tolerance"), ("tokenbutler", "tolerance")),
    ]
    selections = found[2].selections(config)
    assert selections == dict.fromkeys((0.25, 64), SelectionConfig(budget=1.0, allocation="top_p", tolerance=0.1))
    alone = dataclasses.replace(config, allocations="top_p")
    labels = [one.label for one in allocations.allocate_policies(policies, Anything, alone, "", print)]
    assert labels == ["dense", "oracle:top_p", "quest:top_p", "streaming", "oracle_residual", "tokenbutler"]


@pytest.mark.parametrize(
    ("tasks", "prompt_tokens", "read", "dense"),
    [
        ("key_value,needle", 1, (4096, 4096), 3072),
        ("key_value", 0, (4096, 4096), 0),
        ("key_value,perplexity", 1, (1024, 2048), 1),
    ],
)
def test_tolerances_are_found_where_the_answers_of_long_samples_stand(monkeypatch, tasks, prompt_tokens, read, dense):
    found = []
    monkeypatch.setattr(allocations, "read_windows", lambda base, one, *given: found.append((one.context, one.tokens)))

    def calibrate(model, predictor, windows, selection, means, **how):
        found.append(how["prompt_tokens"])
        return [dataclasses.replace(selection, tolerance=0.1)] * len(means)

    monkeypatch.setattr(allocations, "calibrate_tolerance", calibrate)
    one = EvaluatedPolicy("oracle_residual", make_policy("oracle_residual"))
    asked = dict(tasks=tasks, lengths="512,4096", prompt_tokens=prompt_tokens, tokens=2048, budgets="64")
    config = EvalConfig(allocations="tolerance", **asked)
    assert [p.label for p in allocations.allocate_policies([one], SimpleNamespace(model=None), config, "", print)]
    assert found == [read, dense]


@pytest.mark.slow
def test_an_evaluation_under_top_p_reads_the_mean(tmp_path):
    base, _, config = make_perplexity_evaluation(make_model(), tmp_path)
    changes = dict(policies="dense,oracle,quest:page=2", allocations="per_head,top_p", budgets="1/2", prompt_tokens=8)
    report = evaluate(base, None, dataclasses.replace(config, **changes))
    rows = [row for row in report.rows if row["metric"] == "perplexity" and row["policy"] != "dense"]
    assert {(row["policy"], row["allocation"]) for row in rows} == {
        *(("oracle", "per_head"), ("oracle:top_p", "top_p")),
        *(("quest", "per_head"), ("quest:top_p", "top_p")),
    }
    for row in rows:
        if row["allocation"] == "top_p":
            np.testing.assert_allclose(row["attended"], 0.5, rtol=0.04)  # a correction ends within 2 %


def test_every_policy_that_keeps_its_cache_runs_with_each_tail():
    policies = [EvaluatedPolicy(name, make_policy(name)) for name in ("dense", "oracle", "h2o")]
    config = EvalConfig(allocations="per_head", budgets="1/4", tails="0,8")
    found = {one.label: one for one in allocations.allocate_policies(policies, None, config, "", print)}
    assert [*found] == ["dense", "oracle", "oracle:tail=8", "h2o"]
    assert found["oracle:tail=8"].selections(config) == {0.25: SelectionConfig(budget=0.25, tail=8)}
    assert found["oracle"].selections(config) == found["h2o"].selections(config) == {0.25: SelectionConfig(budget=0.25)}
    with pytest.raises(ValueError, match=r"the tails of an evaluation are given as tails=\(8,\)"):
        EvalConfig(selection=SelectionConfig(tail=8))
    lines = []
    [*allocations.allocate_policies(policies, None, dataclasses.replace(config, tails="2048"), "", lines.append)]
    assert lines == ["a tail of 2048 tokens does nothing in rows of at most 1024: no span is ever whole"]
    with pytest.raises(ValueError, match="tail must be at least 0, got -8"):
        EvalConfig(tails="-8")


def test_neighbours_leave_a_tolerance_out_and_a_tail_that_pages_do_not_fit_names_the_policy():
    policies, lines = [EvaluatedPolicy("oracle_residual", make_policy("oracle_residual"))], []
    config = EvalConfig(selection=SelectionConfig(neighbours=True))
    found = allocations.allocate_policies(policies, None, config, "", lines.append)
    assert [one.label for one in found] == ["oracle_residual"]
    assert lines == ["oracle_residual: with neighbours, tolerance is left out"]
    pages = [EvaluatedPolicy("quest", make_policy("quest"))]
    with pytest.raises(ValueError, match="quest: a tail of 4 tokens does not fit quest's pages of 16"):
        list(allocations.allocate_policies(pages, None, EvalConfig(tails="4"), "", print))


def test_what_a_policy_cannot_take_is_told_before_a_tolerance_is_found():
    policies = [EvaluatedPolicy(name, make_policy(name)) for name in ("oracle_residual", "quest")]
    config, said = EvalConfig(budgets="1/4,24"), []
    with pytest.raises(ValueError, match=r"quest: a budget of 24 tokens is below .* = 39"):
        list(allocations.allocate_policies(policies, None, config, "", print, said.append))
    assert said == []


@pytest.mark.slow
def test_a_tolerance_with_a_stride_reads_the_mean_in_the_rows_that_count(tmp_path):
    base, _, config = make_perplexity_evaluation(make_model(), tmp_path)
    changes = dict(policies="dense,oracle_residual", allocations="tolerance", budgets="1/2", stride=20, prompt_tokens=0)
    report = evaluate(base, None, dataclasses.replace(config, **changes))
    (row,) = (r for r in report.rows if r["metric"] == "perplexity" and r["policy"] != "dense")
    assert row["attended"] == pytest.approx(0.5, rel=0.05)


def test_a_tail_brings_an_evaluation_closer_to_dense_and_its_bytes_count(tmp_path):
    base, _, config = make_perplexity_evaluation(make_model(), tmp_path)
    changes = dict(policies="dense,oracle", allocations="per_head", budgets="1/4", tails="0,4", prompt_tokens=8)
    rows = evaluate(base, None, dataclasses.replace(config, **changes)).rows
    found = {(row["metric"], row["tail"]): row["value"] for row in rows if row["policy"].startswith("oracle")}
    assert found["js_divergence", 4] < found["js_divergence", 0]
    whole = next(row["value"] for row in rows if row["metric"] == "bytes_read" and row["policy"] == "dense")
    served = whole * (base.config.layers - 1) / base.config.layers
    assert found["bytes_read", 4] - found["bytes_read", 0] == pytest.approx(served / 4, rel=1e-5)
