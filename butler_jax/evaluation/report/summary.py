"""The main result of a report, from its rows alone: two or three sentences, and one table of what matters most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from butler_jax.evaluation.report.tables import (
    Metric,
    Row,
    best_of,
    budget_label,
    budgets_of,
    is_butler,
    is_reference,
    metric_of,
    usable,
)

MAIN = {"perplexity": "over_dense", "coreference": "miss_rate", "attention": "recalled_mass"}  # others: accuracy
ERRORS = "± is the standard error over the windows or samples of a task; its tables say how many these are."
HEADS = ("", "tokenbutler", "best other policy", "oracle", "dense")


@dataclass(frozen=True)
class Glance:
    """A line of the table of main results: what is measured, and values as words ('' where there is none).

    contest: whether there is something to win.
    """

    what: str
    butler: str
    other: str
    oracle: str
    dense: str
    butler_leads: bool
    contest: bool = True

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The values in the order of HEADS."""
        return self.butler, self.other, self.oracle, self.dense


def glance(rows: Sequence[Row]) -> list[Glance]:
    """Perplexity over dense and what is read for it at every budget, then other tasks' main metric at the smallest."""
    whole = [r for r in rows if not r.get("where") and usable(r["value"])]
    found = []
    for task in dict.fromkeys(r["task"] for r in whole):
        here = [r for r in whole if r["task"] == task]
        metric = MAIN.get(task, "accuracy")
        chosen = [r for r in here if r["metric"] == metric] or [r for r in here if r["metric"] == task]
        budgets = budgets_of(chosen)
        for budget in budgets if task == "perplexity" else budgets[-1:]:
            found.append(_line(task, chosen, budget))
            read = [r for r in here if r["metric"] == "bytes_of_dense" and r["budget"] == budget]
            found += [_read_line(chosen, read, budget)] if task == "perplexity" and read else []
    return found


def summary(rows: Sequence[Row]) -> list[str]:
    """Sentences: the dense model's perplexity, what the widest and the smallest budget cost, who leads how often."""
    text = [r for r in rows if r["task"] == "perplexity" and not r.get("where") and usable(r["value"])]
    found = []
    dense = next((r for r in text if r["metric"] == "perplexity" and r["policy"] == "dense"), None)
    if dense is not None:
        found.append(f"The dense model's perplexity is {_words(metric_of('perplexity'), dense)}.")
    over = [r for r in text if r["metric"] == "over_dense"]
    budgets = budgets_of(over)
    for budget in dict.fromkeys((budgets[:1] + budgets[-1:]) if budgets else ()):
        read = {r["policy"]: r for r in text if r["metric"] == "bytes_of_dense" and r["budget"] == budget}
        sentence = _cost([r for r in over if r["budget"] == budget], read, budget)
        found += [sentence] if sentence else []
    lines = [g for g in glance(rows) if g.butler and g.other and g.contest]
    if lines:
        leads = sum(g.butler_leads for g in lines)
        found.append(
            f"tokenbutler has the better value in {leads} of the {len(lines)} comparisons below, errors aside."
        )
    return found


def _cost(rows: Sequence[Row], read: Mapping[str, Row], budget: float | int | None) -> str:
    """'Reading 50.9 % of the cache in the layers after the first (budget 1/2), tokenbutler is 0.10 % above it (...)'.

    read: rows of bytes_of_dense by policy.
    """
    butler, other = _best(rows, is_butler), _best(rows, _is_other)
    first = butler or other
    if first is None:
        return ""
    shares = [r["attended"] for r in (butler, other) if r is not None and usable(r.get("attended"))]
    where = f"At a budget of {budget_label(budget)}"
    if shares:
        share = f"{100 * sum(shares) / len(shares):.1f}\u00a0%"
        where = f"Reading {share} of the cache in the layers after the first (budget {budget_label(budget)})"

    def bytes_of(row: Row, words: str) -> str:
        found = read.get(row["policy"])
        return f" ({_words(metric_of('bytes_of_dense'), {**found, 'error': None})}{words})" if found else ""

    words = " of the bytes that dense reads in all layers, what it chooses by included"
    sentence = f"{where}, {first['policy']} is {_above(first)} it{bytes_of(first, words)}"
    if butler is not None and other is not None:
        sentence += f", and {other['policy']}, the best other policy, {_above(other)}{bytes_of(other, ' of the bytes')}"
    return sentence + "."


def _above(row: Row) -> str:
    shown = metric_of("over_dense").show(abs(row["value"])).lstrip("+")
    return f"{shown}\u00a0% {'below' if row['value'] < 0 else 'above'}"


def _line(task: str, rows: Sequence[Row], budget: float | int | None) -> Glance:
    metric = metric_of(rows[0]["metric"], rows)
    butler, other, oracle = _compared(rows, budget)
    dense = next((r for r in rows if r["policy"] == "dense"), None)
    both = [r for r in (butler, other) if r is not None]
    name = metric.title if task in ("perplexity", "attention") else f"{task.replace('_', ' ')}, {metric.title}"
    return Glance(
        what=f"{name} at {budget_label(budget)}" if budget is not None else name,
        butler=_named(metric, butler, "tokenbutler"),
        other=_named(metric, other, ""),
        oracle=_words(metric, oracle),
        dense=_words(metric, dense),
        butler_leads=butler is not None and butler["policy"] in best_of(metric, both),
    )


def _compared(rows: Sequence[Row], budget: float | int | None) -> tuple[Row | None, Row | None, Row | None]:
    """The best tokenbutler, the best other policy and the oracle at a budget."""
    here = [r for r in rows if r["budget"] == budget and r["policy"] != "dense"]
    oracle = next((r for r in here if r["policy"] == "oracle"), None)
    return _best(here, is_butler), _best(here, _is_other), oracle


def _read_line(rows: Sequence[Row], read: Sequence[Row], budget: float | int | None) -> Glance:
    """The bytes that the policies of a line of perplexity read. rows: of that metric; read: of bytes_of_dense."""
    by_policy = {r["policy"]: {**r, "error": None} for r in read}  # an error of lengths, below what is shown
    metric = metric_of("bytes_of_dense")
    butler, other, oracle = (one and by_policy.get(one["policy"]) for one in _compared(rows, budget))
    return Glance(
        what=f"{metric.title}, at {budget_label(budget)}",
        butler=_named(metric, butler, "tokenbutler"),
        other=_named(metric, other, ""),
        oracle=_words(metric, oracle),
        dense=f"100.0\u00a0{metric.unit}",
        butler_leads=False,
        contest=False,
    )


def _is_other(policy: str) -> bool:
    return not is_butler(policy) and not is_reference(policy)


def _best(rows: Sequence[Row], of) -> Row | None:
    """The best row among policies that `of` accepts."""
    rows = [r for r in rows if of(r["policy"])]
    names = best_of(metric_of(rows[0]["metric"]), rows) if rows else []
    return next((r for r in rows if r["policy"] in names), rows[0] if rows else None)


def _named(metric: Metric, row: Row | None, known: str) -> str:
    """A value with its policy's name, left out where it is the known one."""
    if row is None:
        return ""
    name = row["policy"].removeprefix(known).lstrip(":")
    return f"{name} {_words(metric, row)}".lstrip()


def _words(metric: Metric, row: Row | None) -> str:
    if row is None:
        return ""
    spread = f" ± {metric.spread(row['error'])}" if usable(row.get("error")) else ""
    return f"{metric.show(row['value'])}{spread} {metric.unit}".rstrip().replace(" ", "\u00a0")
