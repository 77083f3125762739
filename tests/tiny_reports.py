"""Reports of made-up numbers: every task and metric, with values that no two cells share."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

POLICIES = ("dense", "oracle", "streaming", "quest", "tokenbutler:lookahead", "tokenbutler:producer")


BUDGETS = (0.5, 0.125, 64)


def row(task, metric, policy, budget, value, error=0.01, where=None, attended=None, n=64):
    share = {1: 1.0, 0.5: 0.51, 0.125: 0.16, 64: 0.3}.get(budget, budget)
    return {
        "task": task,
        "metric": metric,
        "policy": policy,
        "budget": budget,
        "value": value,
        "error": error,
        "n": n,
        "seed": 0,
        "attended": attended if attended is not None else share,
        "where": where or {},
    }


def rows(policies=POLICIES, budgets=BUDGETS):
    """Every task and metric, with values that no two cells share."""
    draw = np.random.default_rng(0)
    found = []
    for policy in policies:
        for budget in (1,) if policy == "dense" else budgets:
            add = lambda task, metric, value, where=None, p=policy, b=budget: found.append(  # noqa: E731
                row(task, metric, p, b, float(value), float(draw.uniform(0.001, 0.02)), where)
            )
            add("perplexity", "perplexity", draw.uniform(29, 90))
            add("perplexity", "bytes_read", draw.uniform(1e6, 4e7))
            if policy != "dense":
                add("perplexity", "over_dense", draw.uniform(-0.01, 2))
                add("perplexity", "bytes_of_dense", draw.uniform(0.2, 1.1))
                add("perplexity", "js_divergence", draw.uniform(0, 0.5))
                add("perplexity", "top1_agreement", draw.uniform(0.3, 1))
                add("attention", "recalled_mass", draw.uniform(0.3, 1))
            for task in ("needle", "key_value", "variables", "lambada", "piqa"):
                add(task, "accuracy", draw.uniform(0, 1))
            add("coreference", "miss_rate", draw.uniform(0, 1))
            for distance in ("40-80", "80-160", "160-240"):
                add("coreference", "miss_rate", draw.uniform(0, 1), {"distance": distance})
            for depth in (0.0, 0.5, 1.0):
                for length in (256, 512):
                    add("needle", "accuracy", draw.uniform(0, 1), {"depth": depth, "length": length})
    for policy in (p for p in policies if p not in ("dense", "oracle")):
        found.append(row("attention", "hit_rate", policy, None, float(draw.uniform(0.5, 1))))
    return found


def few(found):
    """A report with few figures: perplexity, hit rate and the needle."""
    return [r for r in found if r["metric"] in ("perplexity", "over_dense", "hit_rate") or r["task"] == "needle"]


def report(found=None, **about):
    found = rows() if found is None else found
    rate = np.random.default_rng(1).uniform(0.5, 1, (5, 4)).tolist()
    policies = [p for p in dict.fromkeys(r["policy"] for r in found) if p not in ("dense", "oracle")]
    known = {
        "base": "a model",
        "fingerprint": "0123",
        "predictors": {"tokenbutler": {"kind": "lookahead", "rank": 16}},
        "policies": [{"name": "quest", "page": 16}],
        "versions": {"jax": "0.10"},
        "device": "cpu",
        "config": {"budgets": [0.5, 64], "run": None},
        "command": "python eval.py --run x",
        "date": "2026-01-02",
        "seconds": 3.0,
    }
    reads = {p: make_reads(number) for number, p in enumerate(policies)}
    bins = [{"predicted": [1e-4, 1e-3], "true": [n * 1e-4, 1e-3], "count": [9.0, 5.0]} for n in (2, 3)]
    shares = {"true": [0.2, 0.5, 0.3], "recalled": [0.2, 0.4, 0.1], "read": [0.3, 0.3, 0.4]}
    far = [{"budget": 0.5} | shares, {"budget": 0.125} | shares | {"recalled": [0.2, 0.1, 0.1]}]
    arrays = {"hit_rate": {p: rate for p in policies}, "reads": reads, "reliability": {"tokenbutler:lookahead": bins}}
    arrays["distances"] = {p: far for p in policies}
    return SimpleNamespace(rows=found, arrays=arrays, about=known | about)


def make_reads(number):
    """Where reads went under a policy at two budgets: as much in every head, or, for odd numbers, not."""
    draw = np.random.default_rng(number)
    found = []
    for budget in (0.5, 0.125):
        heads = draw.uniform(0.5, 1.5, (5, 2)) * budget if number % 2 else np.full((5, 2), budget)
        positions = [None, *(budget * draw.uniform(0.5, 1.5, 7) if number % 2 else np.full(7, budget))]
        found.append({"budget": budget, "bin_size": 16, "heads": heads.tolist(), "positions": positions})
    return found
