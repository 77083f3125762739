"""Rows of a report as tables, policies down and budgets across, the same on the console and in every written form."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, Literal

from butler_jax.evaluation.report.shares import (
    DASH,
    READ,
    Row,
    TableColumn,
    find_shares,
    is_finite,
    is_mixed,
    name_served,
)
from butler_jax.policies import POLICIES, Policy

MINUS = "\u2212"

TASKS = {
    "perplexity": "Held-out text. The rows that count read only chosen keys.",
    "attention": "How much of the true attention the chosen keys hold, over rows of the held-out text.",
    "coreference": "The greedy prediction of the last mention of an invented name.",
    "needle": "One sentence is hidden in a long text. The question at the end asks for it.",
    "key_value": "Many pairs of keys and values. The question at the end asks for the value of one key.",
    "variables": "Chains of assignments. The question at the end asks for the value at the end of a chain.",
    "lambada": "The greedy prediction of the last word of a passage.",
    "piqa": "Two endings of a text. The more likely one counts as the answer.",
    "winogrande": "Two referents of a pronoun. The more likely one counts as the answer.",
    "arc_easy": "Questions of school science. The most likely choice counts as the answer.",
}


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: `scale` times the value with `digits` decimals, in `unit`.

    Attributes:
        better: Which direction is better; None where neither is.
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
    "bytes_of_dense": _percent("bytes read for a token, share of dense", None),
    "served_bytes_of_dense": _percent("bytes read for a token in the served layers, share of dense there", None),
    "recalled_mass": _percent("recalled attention mass", "higher"),
    "tied": _percent("chosen by position, since scores are equal", None),
    "hit_rate": _percent("hit rate", "higher"),
    "spearman": Metric("Spearman's rank correlation", "higher"),
    "miss_rate": _percent("miss rate", "lower"),
    "token_inaccuracy": _percent("token inaccuracy", "lower"),
    "accuracy": _percent("accuracy", "higher"),
    "accuracy_norm": _percent("accuracy, length-normalised", "higher"),
}


ALL_OR_NONE = ("accuracy", "accuracy_norm", "miss_rate", "token_inaccuracy")
"""Metrics whose error is not the standard error where all samples are right or all are wrong (`estimate_share`)."""


def find_metric(name: str, rows: Iterable[Row] = ()) -> Metric:
    """How to show a metric. The unit of bytes follows from the largest value of the rows."""
    if name in ("bytes_read", "served_bytes_read"):
        power = max(
            (int(math.log2(r["value"])) // 10 for r in rows if is_finite(r["value"]) and r["value"] >= 1), default=0
        )
        power = min(power, 4)
        title = "bytes read for a token" + (" in the served layers" if name != "bytes_read" else "")
        return Metric(title, None, ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024.0**-power, 2 if power else 0)
    return METRICS.get(name, Metric(name.replace("_", " ")))


def make_title(task: str, metric: Metric) -> str:
    """The title of a table or figure: needle: accuracy (%). Metrics of text have no task before them."""
    return metric.heading if task in ("perplexity", "attention") else f"{task.replace('_', ' ')}: {metric.heading}"


def is_dense(policy: str) -> bool:
    """Whether a label is that of the dense model."""
    return _find_policy(policy).reads_everything


def is_reference(policy: str) -> bool:
    """Whether a label is dense or an oracle: others are compared with it, and it is never the best of a column."""
    return is_dense(policy) or _find_policy(policy).is_bound


def is_butler(policy: str) -> bool:
    """Whether a label is tokenbutler, or tokenbutler:NAME where several predictors are compared."""
    return _find_policy(policy).needs_predictor


def _find_policy(label: str) -> Policy:
    """The policy whose name begins a label, with its default settings. A plain `Policy` for a name that is not known.

    It is one of POLICIES, or the last class with this name that was defined here and has defaults for all its fields.
    """
    name = label.split(":")[0]
    for kind in (POLICIES[name],) if name in POLICIES else reversed(_list_kinds(Policy)):
        if getattr(kind, "name", None) == name:
            with contextlib.suppress(TypeError):
                return kind()
    return Policy()


def _list_kinds(kind: type[Policy]) -> list[type[Policy]]:
    """The classes below a class, as they were defined."""
    found = ([below, *_list_kinds(below)] for below in kind.__subclasses__())
    return list(itertools.chain.from_iterable(found))


def split_dense(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the dense model, and the others."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[not is_dense(row["policy"])].append(row)
    return parts


def at_budget(rows: Iterable[Row], budget: float | int | None) -> list[Row]:
    """The rows at a budget, and those of the dense model."""
    return [r for r in rows if is_dense(r["policy"]) or r["budget"] == budget]


def format_budget(budget: float | int | None) -> str:
    """0.125 -> '1/8', 0.3 -> '0.3', 256 -> '256 tokens', None -> ''."""
    if budget is None:
        return ""
    if isinstance(budget, Integral):
        return f"{budget:,} token{'' if budget == 1 else 's'}"
    share = 1 / budget if budget else 0.0
    return f"1/{round(share)}" if share >= 1.5 and abs(share - round(share)) < 1e-6 else f"{budget:g}"


def sort_budgets(rows: Iterable[Row]) -> list[float | int | None]:
    """The budgets of everything but dense, by the share that was read where it is known, the largest first."""
    found: dict[float | int | None, list[Any]] = {}
    for row in split_dense(rows)[1]:
        found.setdefault(row["budget"], []).append(row.get("attended"))
    if all(is_finite(share) for shares in found.values() for share in shares):
        return sorted(found, key=lambda b: (sum(found[b]) / len(found[b]), b or 0), reverse=True)
    return sorted(found, key=lambda b: (isinstance(b, Integral), -1.0 if b is None else b), reverse=True)


def group_by_metric(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Group rows by task and metric: tasks in the order of the rows, metrics in that of METRICS, others last."""
    groups = _group(rows, lambda r: (r["task"], r["metric"]))
    tasks = list(dict.fromkeys(task for task, _ in groups))
    known = list(METRICS)
    place = {m: known.index(m) if m in known else len(known) for _, m in groups}
    return {key: groups[key] for key in sorted(groups, key=lambda k: (tasks.index(k[0]), place[k[1]]))}


def group_by_coordinates(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Group detail rows by their coordinates: those by depth and length apart from those by length alone."""
    return _group(rows, lambda r: tuple(sorted(r["where"])))


def list_bytes(rows: Iterable[Row]) -> dict[tuple[str, float | int | None], float]:
    """The share of dense's bytes that was read, by policy and budget."""
    return {(r["policy"], r["budget"]): r["value"] for r in rows if r["metric"] == "bytes_of_dense"}


def list_policies(rows: Iterable[Row]) -> list[str]:
    """Labels in the order of the rows, dense first."""
    return sorted(dict.fromkeys(r["policy"] for r in rows), key=lambda p: not is_dense(p))


@dataclass(frozen=True)
class TableCell:
    """One value, with the text that shows it and the text of its error."""

    value: float
    error: float | None
    text: str
    spread: str = ""
    best: bool = False


@dataclass(frozen=True)
class TableLine:
    """A policy and its cells, None where there is no value."""

    policy: str
    cells: tuple[TableCell | None, ...]


@dataclass(frozen=True)
class ReportTable:
    """One metric of one task, or of the part of it that the title names."""

    task: str
    metric: str
    title: str
    note: str
    columns: tuple[TableColumn, ...]
    lines: tuple[TableLine, ...]

    @property
    def spread_widths(self) -> list[int]:
        """For each column the length of its longest error."""
        columns = zip(*(line.cells for line in self.lines), strict=True)
        return [max((len(cell.spread) for cell in column if cell), default=0) for column in columns]


def make_tables(rows: Sequence[Row]) -> list[ReportTable]:
    """Make the tables of the rows about a whole task, in the order of tasks and METRICS; dense has its own column."""
    made = []
    for (task, metric), group in group_by_metric(r for r in rows if not r.get("where")).items():
        dense, sparse = split_dense(group)
        columns = [("dense", dense)] * bool(dense)
        columns += [(format_budget(b), [r for r in sparse if r["budget"] == b]) for b in sort_budgets(sparse)]
        made.append(_make_table(task, metric, group, columns))
    return made


def make_detail_tables(rows: Sequence[Row]) -> list[ReportTable]:
    """Make the tables of the rows about parts of a task, one for each budget: parts across, dense among the policies.

    Where rows have two coordinates (needle: depth and length) there is a table for each value of the second.
    """
    made = []
    for (task, metric), group in group_by_metric(r for r in rows if r.get("where")).items():
        for chosen in group_by_coordinates(group).values():
            made += _make_part_tables(task, metric, chosen)
    return made


def _make_part_tables(task: str, metric: str, rows: Sequence[Row]) -> list[ReportTable]:
    made, across, budgets = [], find_axis(rows), sort_budgets(rows)
    for budget in budgets or [1]:
        for rest, chosen in _group(at_budget(rows, budget), lambda r: _write_place(r["where"], without=across)).items():
            parts = sorted(_group(chosen, lambda r: r["where"][across]).items(), key=lambda item: sort_key(item[0]))
            table = _make_table(
                task, metric, chosen, [(f"{across} {format_part(v)}", p) for v, p in parts], shares=False
            )
            part = ", ".join(w for w in (format_budget(budget) if budgets else "dense", rest) if w)
            made.append(replace(table, title=f"{table.title}, {part}"))
    return made


def find_axis(rows: Iterable[Row]) -> str:
    """The coordinate of `where` that has most values: it runs across a table and along a figure's axis."""
    values: dict[str, set] = {}
    for row in rows:
        for key, value in row["where"].items():
            values.setdefault(key, set()).add(value)
    return max(values, key=lambda k: len(values[k]))


def format_part(value: Any) -> str:
    """A value of `where` as words: '200-240', 512 or 0.5."""
    return f"{value:g}" if isinstance(value, float) else str(value).replace("-", DASH)


def sort_key(value: Any) -> tuple[float, str]:
    """A key that sorts numbers and ranges such as '200-240' by their beginning."""
    head = str(value).split("-")[0].lstrip("<>= ")
    try:
        return float(head), str(value)
    except ValueError:
        return math.inf, str(value)


def _write_place(where: Mapping[str, Any], without: str) -> str:
    return ", ".join(f"{k} {format_part(v)}" for k, v in where.items() if k != without)


def _group(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _make_table(
    task: str, metric: str, rows: Sequence[Row], columns: Sequence[tuple[str, list[Row]]], shares: bool = True
) -> ReportTable:
    """Make a table. `columns` are labels, each with its rows."""
    shown = find_metric(metric, rows)
    lines = tuple(
        TableLine(policy, tuple(_make_cell(shown, policy, inside) for _, inside in columns))
        for policy in list_policies(rows)
    )
    heads = tuple(
        TableColumn(c, *map(partial(find_shares, inside), READ)) if shares and not is_dense(c) else TableColumn(c)
        for c, inside in columns
    )
    return ReportTable(
        task=task,
        metric=metric,
        title=make_title(task, shown),
        note=_write_note(shown, rows, any(c.share for c in heads)),
        columns=heads,
        lines=lines,
    )


def _make_cell(metric: Metric, policy: str, column: Sequence[Row]) -> TableCell | None:
    row = next((r for r in column if r["policy"] == policy), None)
    if row is None or row["value"] is None:
        return None
    error = row.get("error")
    return TableCell(
        value=row["value"],
        error=error,
        text=metric.show(row["value"]),
        spread=metric.spread(error) if is_finite(error) else "",
        best=policy in find_best(metric, column),
    )


def find_best(metric: Metric, rows: Iterable[Row]) -> list[str]:
    """The policies with the best value, references aside; none where fewer than two are compared."""
    values = {r["policy"]: r["value"] for r in rows if not is_reference(r["policy"]) and is_finite(r["value"])}
    if metric.better is None or len(values) < 2:
        return []
    best = min(values.values()) if metric.better == "lower" else max(values.values())
    return [p for p, v in values.items() if v == best]


def _write_note(metric: Metric, rows: Sequence[Row], shares: bool) -> str:
    count = _format_range(rows, "n")
    words = [f"n = {count}"] if count else []
    words += [f"{metric.better} is better"] if metric.better else []
    words += [_write_error_note(rows)] if any(is_finite(r.get("error")) for r in rows) else []
    if rows[0]["metric"] in ALL_OR_NONE and any(r["value"] in (0, 1) and r.get("error") for r in rows):
        words += [
            "at 0 and 100 %, where the standard error is 0, ± is the length of the Wilson interval, 1 / (samples + 1)"
        ]
    if shares:
        words += [f"% read: of the keys, {name_served(rows)}" + (", and of what dense reads" if is_mixed(rows) else "")]
    return "; ".join(words)


def _write_error_note(rows: Sequence[Row]) -> str:
    """What ± is: the standard error over 16 windows."""
    count, units = _format_range(rows, "sequences"), {r.get("unit") for r in rows}
    words = "± standard error"
    if count and len(units) == 1:
        words += f" over {count} {units.pop()}"
    if any(str(r.get("unit")).startswith("overlapping") for r in rows):
        words += ", which are not independent, so it is too small"
    return words


def _format_range(rows: Sequence[Row], field: str) -> str:
    """'16', or '12 to 16' where rows differ; empty where unknown."""
    counts = sorted({r[field] for r in rows if r.get(field) is not None})
    return " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1]))) if counts else ""
