"""The main result of a report in a few sentences, from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence

from butler_jax.evaluation.tables import (
    Row,
    best_of,
    budget_label,
    budgets_of,
    is_butler,
    is_reference,
    metric_of,
    policies_of,
    usable,
)

MAIN = {"needle": "accuracy", "coreference": "miss_rate", "attention": "hit_rate"}  # others: accuracy


def summary(rows: Sequence[Row]) -> list[str]:
    """Sentences: perplexity at every budget, then every other task at its smallest budget."""
    whole = [r for r in rows if not r.get("where") and usable(r["value"])]
    found = _perplexity([r for r in whole if r["task"] == "perplexity"])
    for task in dict.fromkeys(r["task"] for r in whole if r["task"] != "perplexity"):
        metric = MAIN.get(task, "accuracy")
        chosen = [r for r in whole if r["task"] == task and r["metric"] == metric]
        budgets = budgets_of(chosen)
        sentence = _compared(chosen, metric, budgets[-1]) if budgets else ""
        dense = _value(chosen, "dense", 1)
        if not sentence and dense is not None:
            sentence = f"dense {_shown(metric, dense)}"
        if sentence:
            at = f" at {budget_label(budgets[-1])}" if budgets and budgets[-1] is not None else ""
            found.append(f"{task.replace('_', ' ').capitalize()}, {metric_of(metric).title}{at}: {sentence}.")
    return found


def _perplexity(rows: Sequence[Row]) -> list[str]:
    plain = [r for r in rows if r["metric"] == "perplexity"]
    dense = next((r for r in plain if r["policy"] == "dense"), None)
    found = []
    if dense is not None:
        found.append(f"The dense model has a perplexity of {_with_error('perplexity', dense)} on this text.")
    over = [r for r in rows if r["metric"] == "over_dense"]
    metric, chosen = ("over_dense", over) if over else ("perplexity", plain)
    for budget in budgets_of(chosen):
        shares = [r["attended"] for r in chosen if r["budget"] == budget and usable(r.get("attended"))]
        read = f" ({100 * sum(shares) / len(shares):.1f} % of the cache read)" if shares else ""
        what = "perplexity over dense" if over else "perplexity"
        found.append(f"Budget {budget_label(budget)}{read}, {what}: {_compared(chosen, metric, budget)}.")
    return found


def _compared(rows: Sequence[Row], metric: str, budget: float | int | None) -> str:
    """'tokenbutler +1.2 ± 0.1 %; best other policy: lowrank, +3.4 ± 0.2 %; oracle +0.9 %; dense ...'."""
    here = [r for r in rows if r["budget"] == budget and r["policy"] != "dense"]
    butler = _best([r for r in here if is_butler(r["policy"])], metric)
    other = _best([r for r in here if not is_butler(r["policy"]) and not is_reference(r["policy"])], metric)
    words = []
    if butler is not None:
        words.append(f"{butler['policy']} {_with_error(metric, butler)}")
    if other is not None:
        what = "best other policy: " if butler is not None else "best policy: "
        words.append(f"{what}{other['policy']}, {_with_error(metric, other)}")
    for policy in [p for p in policies_of(rows) if is_reference(p)]:
        row = _value(rows, policy, 1 if policy == "dense" else budget)
        if row is not None:
            words.append(f"{policy} {_shown(metric, row)}")
    return "; ".join(words)


def _best(rows: Sequence[Row], metric: str) -> Row | None:
    names = best_of(metric_of(metric), rows) or policies_of(rows)[:1]
    return next((r for r in rows if r["policy"] in names), None)


def _value(rows: Sequence[Row], policy: str, budget: float | int | None) -> Row | None:
    return next((r for r in rows if r["policy"] == policy and r["budget"] == budget), None)


def _shown(metric: str, row: Row) -> str:
    shown = metric_of(metric, [row])
    return f"{shown.show(row['value'])} {shown.unit}".rstrip()


def _with_error(metric: str, row: Row) -> str:
    shown = metric_of(metric, [row])
    spread = f" ± {shown.spread(row['error'])}" if usable(row.get("error")) else ""
    return f"{shown.show(row['value'])}{spread} {shown.unit}".rstrip()
