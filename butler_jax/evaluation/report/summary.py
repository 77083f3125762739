"""The main results of a report, from its rows alone: two or three sentences, and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from butler_jax.evaluation.report.tables import (
    Metric,
    Row,
    find_best,
    find_metric,
    format_budget,
    is_butler,
    is_finite,
    is_reference,
    sort_budgets,
    split_dense,
)

MAIN = {"perplexity": "over_dense", "coreference": "miss_rate", "attention": "recalled_mass"}  # others: accuracy
ERRORS = "± is the standard error over the windows or samples of a task. The tables of the task say how many there are."
HEADS = ("", "tokenbutler", "best other policy", "oracle", "dense")


@dataclass(frozen=True)
class SummaryLine:
    """A line of the table of main results.

    Attributes:
        what: What is measured.
        butler, other, oracle, dense: Values as words; "" where there is none.
        butler_leads: Whether tokenbutler has the better value.
        compared: Whether one value is better than another.
    """

    what: str
    butler: str
    other: str
    oracle: str
    dense: str
    butler_leads: bool
    compared: bool = True

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The values in the order of HEADS."""
        return self.butler, self.other, self.oracle, self.dense


def make_summary_lines(rows: Sequence[Row]) -> list[SummaryLine]:
    """Make lines of perplexity and bytes read at every budget, then the main metric of other tasks at the smallest."""
    whole = [r for r in rows if not r.get("where") and is_finite(r["value"])]
    found = []
    for task in dict.fromkeys(r["task"] for r in whole):
        here = [r for r in whole if r["task"] == task]
        metric = MAIN.get(task, "accuracy")
        chosen = [r for r in here if r["metric"] == metric] or [r for r in here if r["metric"] == task]
        budgets = sort_budgets(chosen)
        for budget in budgets if task == "perplexity" else budgets[-1:]:
            found.append(_make_line(task, chosen, budget))
            read = [r for r in here if r["metric"] == "bytes_of_dense" and r["budget"] == budget]
            found += [_make_bytes_line(chosen, read, budget)] if task == "perplexity" and read else []
    return found


def summarise(rows: Sequence[Row]) -> list[str]:
    """Write sentences: the dense perplexity, its rise at the largest and the smallest budget, the comparisons."""
    text = [r for r in rows if r["task"] == "perplexity" and not r.get("where") and is_finite(r["value"])]
    found = []
    dense = next((r for r in split_dense(text)[0] if r["metric"] == "perplexity"), None)
    if dense is not None:
        found.append(f"The dense model's perplexity is {_write_value(find_metric('perplexity'), dense)}.")
    over = [r for r in text if r["metric"] == "over_dense"]
    budgets = sort_budgets(over)
    for budget in dict.fromkeys((budgets[:1] + budgets[-1:]) if budgets else ()):
        read = {r["policy"]: r for r in text if r["metric"] == "bytes_of_dense" and r["budget"] == budget}
        sentence = _write_cost([r for r in over if r["budget"] == budget], read, budget)
        found += [sentence] if sentence else []
    lines = [g for g in make_summary_lines(rows) if g.butler and g.other and g.compared]
    if lines:
        leads = sum(g.butler_leads for g in lines)
        found.append(
            f"tokenbutler has the better value in {leads} of the {len(lines)} comparisons below "
            "(standard errors not considered)."
        )
    return found


def _write_cost(rows: Sequence[Row], read: Mapping[str, Row], budget: float | int | None) -> str:
    """'Reading 50.9 % of the cache in the layers after the first (budget 1/2), tokenbutler is 0.10 % above it (...)'.

    read: rows of bytes_of_dense by policy.
    """
    butler, other = _pick_best(rows, is_butler), _pick_best(rows, _is_other)
    first = butler or other
    if first is None:
        return ""
    shares = [r["attended"] for r in (butler, other) if r is not None and is_finite(r.get("attended"))]
    where = f"At a budget of {format_budget(budget)}"
    if shares:
        share = f"{100 * sum(shares) / len(shares):.1f}\u00a0%"
        where = f"Reading {share} of the cache in the layers after the first (budget {format_budget(budget)})"

    def bytes_of(row: Row, words: str) -> str:
        found = read.get(row["policy"])
        return f" ({_write_value(find_metric('bytes_of_dense'), {**found, 'error': None})}{words})" if found else ""

    words = " of the bytes that dense reads in all layers, those for its choice included"
    sentence = f"{where}, {first['policy']} is {_write_excess(first)} it{bytes_of(first, words)}"
    if butler is not None and other is not None:
        sentence += (
            f", and {other['policy']}, the best other policy, {_write_excess(other)}{bytes_of(other, ' of the bytes')}"
        )
    return sentence + "."


def _write_excess(row: Row) -> str:
    shown = find_metric("over_dense").show(abs(row["value"])).lstrip("+")
    return f"{shown}\u00a0% {'below' if row['value'] < 0 else 'above'}"


def _make_line(task: str, rows: Sequence[Row], budget: float | int | None) -> SummaryLine:
    metric = find_metric(rows[0]["metric"], rows)
    butler, other, oracle = _pick_compared(rows, budget)
    dense = next(iter(split_dense(rows)[0]), None)
    both = [r for r in (butler, other) if r is not None]
    name = metric.title if task in ("perplexity", "attention") else f"{task.replace('_', ' ')}, {metric.title}"
    return SummaryLine(
        what=f"{name} at {format_budget(budget)}" if budget is not None else name,
        butler=_write_named(metric, butler, "tokenbutler"),
        other=_write_named(metric, other, ""),
        oracle=_write_value(metric, oracle),
        dense=_write_value(metric, dense),
        butler_leads=butler is not None and butler["policy"] in find_best(metric, both),
    )


def _pick_compared(rows: Sequence[Row], budget: float | int | None) -> tuple[Row | None, Row | None, Row | None]:
    """The best tokenbutler, the best other policy and the oracle at a budget."""
    here = [r for r in split_dense(rows)[1] if r["budget"] == budget]
    oracle = next((r for r in here if r["policy"] == "oracle"), None)
    return _pick_best(here, is_butler), _pick_best(here, _is_other), oracle


def _make_bytes_line(rows: Sequence[Row], read: Sequence[Row], budget: float | int | None) -> SummaryLine:
    """The bytes that the policies of a line of perplexity read. rows: of that metric; read: of bytes_of_dense."""
    by_policy = {
        r["policy"]: {**r, "error": None} for r in read
    }  # it comes from lengths alone, and is smaller than a digit shown
    metric = find_metric("bytes_of_dense")
    butler, other, oracle = (one and by_policy.get(one["policy"]) for one in _pick_compared(rows, budget))
    return SummaryLine(
        what=f"{metric.title}, at {format_budget(budget)}",
        butler=_write_named(metric, butler, "tokenbutler"),
        other=_write_named(metric, other, ""),
        oracle=_write_value(metric, oracle),
        dense=f"100.0\u00a0{metric.unit}",
        butler_leads=False,
        compared=False,
    )


def _is_other(policy: str) -> bool:
    return not is_butler(policy) and not is_reference(policy)


def _pick_best(rows: Sequence[Row], of) -> Row | None:
    """The best row among policies that `of` accepts."""
    rows = [r for r in rows if of(r["policy"])]
    names = find_best(find_metric(rows[0]["metric"]), rows) if rows else []
    return next((r for r in rows if r["policy"] in names), rows[0] if rows else None)


def _write_named(metric: Metric, row: Row | None, known: str) -> str:
    """A value with its policy's name, left out where it is the known one."""
    if row is None:
        return ""
    name = row["policy"].removeprefix(known).lstrip(":")
    return f"{name} {_write_value(metric, row)}".lstrip()


def _write_value(metric: Metric, row: Row | None) -> str:
    if row is None:
        return ""
    spread = f" ± {metric.spread(row['error'])}" if is_finite(row.get("error")) else ""
    return f"{metric.show(row['value'])}{spread} {metric.unit}".rstrip().replace(" ", "\u00a0")
