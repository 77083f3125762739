"""Rows of a report to tables: policies down, budgets across; the console and every written form show the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

Row = Mapping[str, Any]
MINUS, DASH = "\u2212", "\u2013"

TASKS = {
    "perplexity": "Held-out text; every row reads only the keys that were chosen for it.",
    "attention": "How much of the true attention the chosen keys hold, over the rows of the held-out text.",
    "coreference": "The last mention of an invented name, predicted greedily.",
    "needle": "One sentence hidden in a long text, asked for at the end.",
    "key_value": "Many pairs of keys and values, one of them asked for at the end.",
    "variables": "A chain of assignments, followed to its end.",
    "lambada": "The last word of a passage.",
    "piqa": "Two endings, the more likely one counts.",
    "winogrande": "Two referents, the more likely one counts.",
    "arc_easy": "Questions of school science, the most likely answer counts.",
}


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: `scale` times the value with `digits` decimals, in `unit`.

    better: which direction wins, None where there is nothing to win.
    """

    title: str
    better: Literal["lower", "higher"] | None = None
    unit: str = ""
    scale: float = 1.0
    digits: int = 3
    signed: bool = False

    def show(self, value: float) -> str:
        """A value without its unit, with a true minus sign."""
        return f"{self.scale * value:{'+' if self.signed else ''}.{self.digits}f}".replace("-", MINUS)

    def spread(self, error: float) -> str:
        """A standard error without its unit or sign."""
        return f"{self.scale * error:.{self.digits}f}"

    @property
    def heading(self) -> str:
        """Title and unit: accuracy (%)."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


def _percent(title: str, better: Literal["lower", "higher"] | None, digits: int = 1, signed: bool = False) -> Metric:
    return Metric(title, better, "%", 100.0, digits, signed)


METRICS = {
    "perplexity": Metric("perplexity", "lower"),
    "over_dense": _percent("perplexity over dense", "lower", 2, signed=True),
    "js_divergence": Metric("Jensen-Shannon divergence from dense", "lower", "nats", digits=4),
    "top1_agreement": _percent("top-1 agreement with dense", "higher"),
    "effective_sparsity": _percent("effective sparsity", None),
    "bytes_of_dense": _percent("bytes read for a token, of dense", None),
    "recalled_mass": _percent("recalled attention mass", "higher"),
    "hit_rate": _percent("hit rate", "higher"),
    "spearman": Metric("Spearman's rank correlation", "higher"),
    "miss_rate": _percent("miss rate", "lower"),
    "token_inaccuracy": _percent("token inaccuracy", "lower"),
    "accuracy": _percent("accuracy", "higher"),
    "accuracy_norm": _percent("accuracy, length-normalised", "higher"),
}


ALL_OR_NONE = ("accuracy", "accuracy_norm", "miss_rate", "token_inaccuracy")
"""Metrics whose error is not the standard error where all samples are right or all are wrong (statistics.share)."""


def metric_of(name: str, rows: Iterable[Row] = ()) -> Metric:
    """How to show a metric; for bytes the unit follows from the largest of the rows' values."""
    if name == "bytes_read":
        power = max(
            (int(math.log2(r["value"])) // 10 for r in rows if usable(r["value"]) and r["value"] >= 1), default=0
        )
        power = min(power, 4)
        return Metric(
            "read for a token", None, ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024.0**-power, 2 if power else 0
        )
    return METRICS.get(name, Metric(name.replace("_", " ")))


def title_of(task: str, metric: Metric) -> str:
    """What a table or figure is called: needle: accuracy (%). Metrics of the text itself stand alone."""
    return metric.heading if task in ("perplexity", "attention") else f"{task.replace('_', ' ')}: {metric.heading}"


def usable(value: Any) -> bool:
    """Whether a value is a finite number."""
    return value is not None and math.isfinite(value)


def is_reference(policy: str) -> bool:
    """Dense and the oracles: what others are compared with, and never the best of a column."""
    return policy == "dense" or policy.startswith("oracle")


def is_butler(policy: str) -> bool:
    """tokenbutler, or tokenbutler:NAME where several predictors are compared."""
    return policy.split(":")[0] == "tokenbutler"


def budget_label(budget: float | int | None) -> str:
    """0.125 -> '1/8', 0.3 -> '0.3', 256 -> '256 tokens', None -> ''."""
    if budget is None:
        return ""
    if isinstance(budget, Integral):
        return f"{budget:,} tokens"
    share = 1 / budget if budget else 0.0
    return f"1/{round(share)}" if share >= 1.5 and abs(share - round(share)) < 1e-6 else f"{budget:g}"


def budgets_of(rows: Iterable[Row]) -> list[float | int | None]:
    """The budgets of everything but dense, by the share that was read where it is known, the widest first."""
    found: dict[float | int | None, list[Any]] = {}
    for row in rows:
        if row["policy"] != "dense":
            found.setdefault(row["budget"], []).append(row.get("attended"))
    if all(usable(share) for shares in found.values() for share in shares):
        return sorted(found, key=lambda b: (sum(found[b]) / len(found[b]), b or 0), reverse=True)
    return sorted(found, key=lambda b: (isinstance(b, Integral), -1.0 if b is None else b), reverse=True)


def by_metric(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows a (task, metric): tasks as the rows have them, metrics as METRICS has them, others at the end."""
    groups = _by(rows, lambda r: (r["task"], r["metric"]))
    tasks = list(dict.fromkeys(task for task, _ in groups))
    known = list(METRICS)
    place = {m: known.index(m) if m in known else len(known) for _, m in groups}
    return {key: groups[key] for key in sorted(groups, key=lambda k: (tasks.index(k[0]), place[k[1]]))}


def by_coordinates(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Detail rows a set of coordinates: those by depth and length apart from those by length alone."""
    return _by(rows, lambda r: tuple(sorted(r["where"])))


def policies_of(rows: Iterable[Row]) -> list[str]:
    """Labels in the order of the rows, dense first."""
    return sorted(dict.fromkeys(r["policy"] for r in rows), key=lambda p: p != "dense")


@dataclass(frozen=True)
class Cell:
    """One value as it is shown, and as it was found."""

    value: float
    error: float | None
    text: str
    spread: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A budget (or a part of a task) with the smallest and the largest share of the keys that policies read there."""

    label: str
    read: tuple[float, float] | None = None

    @property
    def share(self) -> str:
        """'15.0 % read', or a range where policies differ; empty where unknown. Of the layers after the first."""
        if self.read is None:
            return ""
        low, high = (f"{100 * r:.1f}" for r in self.read)
        return f"{low} % read" if low == high else f"{low}{DASH}{high} % read"


@dataclass(frozen=True)
class Line:
    """A policy and its cells, None where there is no value."""

    policy: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """One metric of one task. part: what a detail table is about, as title words; empty for the whole."""

    task: str
    metric: str
    title: str
    note: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    part: str = ""


def tables(rows: Sequence[Row]) -> list[Table]:
    """The tables of the rows about a whole task, in the order of tasks and METRICS. Dense has a column of its own."""
    made = []
    for (task, metric), group in by_metric(r for r in rows if not r.get("where")).items():
        budgets = budgets_of(group)
        dense = [r for r in group if r["policy"] == "dense"]
        columns = [("dense", dense)] * bool(dense)
        columns += [
            (budget_label(b), [r for r in group if r["policy"] != "dense" and r["budget"] == b]) for b in budgets
        ]
        made.append(_table(task, metric, group, columns))
    return made


def detail_tables(rows: Sequence[Row]) -> list[Table]:
    """The tables of the rows about parts of a task, one a budget: parts across, dense among the policies.

    Where rows have two coordinates (needle: depth and length) there is one table a value of the second.
    """
    made = []
    for (task, metric), group in by_metric(r for r in rows if r.get("where")).items():
        for chosen in by_coordinates(group).values():
            made += _parts(task, metric, chosen)
    return made


def _parts(task: str, metric: str, rows: Sequence[Row]) -> list[Table]:
    made, across, budgets = [], part_key(rows), budgets_of(rows)
    for budget in budgets or [1]:
        inside = [r for r in rows if r["policy"] == "dense" or r["budget"] == budget]
        for rest, chosen in _by(inside, lambda r: _words(r["where"], without=across)).items():
            parts = sorted(_by(chosen, lambda r: r["where"][across]).items(), key=lambda item: order(item[0]))
            table = _table(task, metric, chosen, [(f"{across} {show_part(v)}", p) for v, p in parts], shares=False)
            part = ", ".join(w for w in (budget_label(budget) if budgets else "dense", rest) if w)
            made.append(replace(table, part=part, title=f"{table.title}, {part}"))
    return made


def part_key(rows: Iterable[Row]) -> str:
    """The coordinate of `where` that has most values: it runs across a table and along a figure's axis."""
    values: dict[str, set] = {}
    for row in rows:
        for key, value in row["where"].items():
            values.setdefault(key, set()).add(value)
    return max(values, key=lambda k: len(values[k]))


def show_part(value: Any) -> str:
    """A value of `where` as words: '200-240', 512 or 0.5."""
    return f"{value:g}" if isinstance(value, float) else str(value).replace("-", DASH)


def order(value: Any) -> tuple[float, str]:
    """Sorts numbers and ranges such as '200-240' by their beginning."""
    head = str(value).split("-")[0].lstrip("<>= ")
    try:
        return float(head), str(value)
    except ValueError:
        return math.inf, str(value)


def _words(where: Mapping[str, Any], without: str) -> str:
    return ", ".join(f"{k} {show_part(v)}" for k, v in where.items() if k != without)


def _by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _table(
    task: str, metric: str, rows: Sequence[Row], columns: Sequence[tuple[str, list[Row]]], shares: bool = True
) -> Table:
    """One table: `columns` are labels with the rows that stand under them."""
    shown = metric_of(metric, rows)
    lines = tuple(
        Line(policy, tuple(_cell(shown, policy, inside) for _, inside in columns)) for policy in policies_of(rows)
    )
    heads = tuple(Column(c, _read(inside) if shares and c != "dense" else None) for c, inside in columns)
    return Table(
        task=task,
        metric=metric,
        title=title_of(task, shown),
        note=_note(shown, rows, any(c.share for c in heads)),
        columns=heads,
        lines=lines,
    )


def _cell(metric: Metric, policy: str, column: Sequence[Row]) -> Cell | None:
    row = next((r for r in column if r["policy"] == policy), None)
    if row is None or row["value"] is None:
        return None
    error = row.get("error")
    return Cell(
        value=row["value"],
        error=error,
        text=metric.show(row["value"]),
        spread=metric.spread(error) if usable(error) else "",
        best=policy in best_of(metric, column),
    )


def best_of(metric: Metric, rows: Iterable[Row]) -> list[str]:
    """The policies with the best value, references aside; none where fewer than two compete."""
    values = {r["policy"]: r["value"] for r in rows if not is_reference(r["policy"]) and usable(r["value"])}
    if metric.better is None or len(values) < 2:
        return []
    best = min(values.values()) if metric.better == "lower" else max(values.values())
    return [p for p, v in values.items() if v == best]


def _read(rows: Sequence[Row]) -> tuple[float, float] | None:
    shares = [r["attended"] for r in rows if r["budget"] is not None and usable(r.get("attended"))]
    return (min(shares), max(shares)) if shares else None


def _note(metric: Metric, rows: Sequence[Row], shares: bool) -> str:
    count = _range(rows, "n")
    words = [f"n = {count}"] if count else []
    words += [f"{metric.better} is better"] if metric.better else []
    words += [_over(rows)] if any(usable(r.get("error")) for r in rows) else []
    if rows[0]["metric"] in ALL_OR_NONE and any(r["value"] in (0, 1) and r.get("error") for r in rows):
        words += ["at 0 and 100 %, where that would be 0, the reach of the Wilson interval, 1 / (samples + 1)"]
    words += ["% read: of the keys, in the layers after the first"] if shares else []
    return "; ".join(words)


def _over(rows: Sequence[Row]) -> str:
    """What ± is: the standard error over 16 windows."""
    count, units = _range(rows, "sequences"), {r.get("unit") for r in rows}
    words = "± standard error"
    if count and len(units) == 1:
        words += f" over {count} {units.pop()}"
    if any(str(r.get("unit")).startswith("overlapping") for r in rows):
        words += ", which are not independent: too small"
    return words


def _range(rows: Sequence[Row], field: str) -> str:
    """'16', or '12 to 16' where rows differ; empty where unknown."""
    counts = sorted({r[field] for r in rows if r.get(field) is not None})
    return " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1]))) if counts else ""
