"""The main results of a report, from its rows alone: up to three sentences, and one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from butler_jax.evaluation.report.modes import name_prompt
from butler_jax.evaluation.report.shares import is_mixed
from butler_jax.evaluation.report.tables import (
    Metric,
    Row,
    find_best,
    find_metric,
    format_budget,
    is_butler,
    is_finite,
    is_reference,
    list_bytes,
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
        butler_leads: Whether tokenbutler has the better value of the first two; None where they are equal.
        bytes: What was read for the values, as words; "" where that is not known.
    """

    what: str
    butler: str
    other: str
    oracle: str
    dense: str
    butler_leads: bool | None
    bytes: tuple[str, str, str, str] = ("",) * 4

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """The values in the order of HEADS, each with its bytes."""
        return tuple(zip((self.butler, self.other, self.oracle, self.dense), self.bytes, strict=True))


def make_summary_lines(rows: Sequence[Row]) -> list[SummaryLine]:
    """Make lines of perplexity and bytes read at every budget, then of other tasks' main metric at the smallest."""
    whole = [r for r in rows if not r.get("where") and is_finite(r["value"])]
    found = []
    for task in dict.fromkeys(r["task"] for r in whole):
        here = [r for r in whole if r["task"] == task]
        metric = MAIN.get(task, "accuracy")
        chosen = [r for r in here if r["metric"] == metric] or [r for r in here if r["metric"] == task]
        budgets, read = sort_budgets(chosen), list_bytes(here)
        for budget in budgets if task == "perplexity" else budgets[-1:]:
            found.append(_make_line(task, chosen, budget, read))
    return found


def summarise(rows: Sequence[Row]) -> list[str]:
    """Write three sentences about perplexity: the dense model, the smallest budget, and the comparison in bytes.

    One more names policies whose perplexity is not finite, of which the others do not speak.

    They follow from the rows alone, whichever policy they speak for. Two values tie where they differ by less than the
    standard error of the difference, with both errors taken as independent.
    """
    text = [r for r in rows if r["task"] == "perplexity" and not r.get("where")]
    broken = dict.fromkeys(
        r["policy"] for r in text if r["metric"] in ("perplexity", "over_dense") and not is_finite(r["value"])
    )
    text = [r for r in text if is_finite(r["value"])]
    dense = next((r for r in split_dense(text)[0] if r["metric"] == "perplexity"), None)
    over = [r for r in text if r["metric"] == "over_dense"]
    least = [r for r in over if r["budget"] == sort_budgets(over)[-1]] if over else []
    read = list_bytes(text)
    found = [_write_dense(dense) if dense is not None else "", _write_least(least), _write_bytes(least, over, read)]
    found.append(f"The perplexity of {', '.join(broken)} is not finite." if broken else "")
    return [sentence for sentence in found if sentence]


def _write_dense(row: Row) -> str:
    """'The dense model has a perplexity of 20.0 ± 0.5 over 16 windows, after a prompt of 256 tokens.'"""
    count, prompt = row.get("sequences"), row.get("prompt_tokens")
    unit = str(row.get("unit") or "").removesuffix("s" if count == 1 else "")
    over = f" over {count:,} {unit}" if count and unit else ""
    after = f", {name_prompt(prompt)}" if prompt else ""
    return f"The dense model has a perplexity of {_write_value(find_metric('perplexity'), row)}{over}{after}."


def _write_least(rows: Sequence[Row]) -> str:
    """The best policy at the smallest budget, those that tie with it or the next one, and the oracle. rows: of it."""
    ranked = sorted((r for r in rows if not is_reference(r["policy"])), key=lambda r: r["value"])
    if not ranked:
        return ""
    best, *others = ranked
    shares = [r["attended"] for r in rows if is_finite(r.get("attended"))]
    aside = " in the served layers" if is_mixed(rows) else ", layer 0 aside"
    read = f" ({_write_range(shares)} of the keys read{aside})" if shares else ""
    words = f"At the smallest budget, {format_budget(best['budget'])}{read}, {best['policy']} is {_write_excess(best)}"
    ties = [r for r in others if _compare(r, best) == 0]
    if ties:
        words += f"; {_list_named(ties)} tie{'s' if len(ties) == 1 else ''} with it"
    elif others:
        words += f", ahead of all other policies; the next is {others[0]['policy']}, {_write_excess(others[0])}"
    bound = _pick_best(rows, _is_oracle)
    if bound is None:
        return words + "."
    named = "" if bound["policy"] == "oracle" else f" ({bound['policy']})"
    return words + f"; the attention oracle{named} is {_write_excess(bound)}."


def _write_bytes(least: Sequence[Row], over: Sequence[Row], read: Mapping[tuple[str, Any], float]) -> str:
    """How tokenbutler, or the best policy, stands at the smallest budget beside others that read no more bytes.

    least: rows at the smallest budget. over: at all. read: the share of dense's bytes by policy and budget.
    """
    mine = _pick_best(least, is_butler) or _pick_best(least, _is_other)
    if mine is None or _key(mine) not in read:
        return ""
    most = read[_key(mine)]
    rivals: dict[str, Row] = {}  # the best row of each other policy
    for row in over:
        policy = row["policy"]
        if _is_other(policy) and policy != mine["policy"] and read.get(_key(row), math.inf) <= most:
            rivals[policy] = min(rivals.get(policy, row), row, key=lambda r: r["value"])

    def name(row):
        return f"{row['policy']} at {format_budget(row['budget'])}"

    ranked = sorted(rivals.values(), key=lambda r: r["value"])
    head = f"In bytes, {name(mine)} ({_write_share(most)} of what dense reads, all layers and its choice counted)"
    if not ranked:
        return f"{head} has no rival: no other policy with a finite perplexity reads as few."
    better, ties = ([r for r in ranked if _compare(r, mine) == sign] for sign in (-1, 0))
    if not better and not ties:
        return (
            f"{head} is ahead of all other policies that read no more; the next is {name(ranked[0])} "
            f"({_write_share(read[_key(ranked[0])])}), {_write_excess(ranked[0])}."
        )
    words = [f"is behind {_list_named(better, name)}"] if better else []
    words += [f"merely ties {_list_named(ties, name)}"] if ties else []
    first = (better or ties)[0]
    return (
        f"{head} {' and '.join(words)}: {name(first)} is {_write_excess(first)} for {_write_share(read[_key(first)])}, "
        f"{mine['policy']} {_write_excess(mine)}."
    )


def _key(row: Row) -> tuple[str, Any]:
    return row["policy"], row["budget"]


def _compare(one: Row, other: Row) -> int:
    """-1 where the value of one is lower, 1 where it is higher, 0 where they tie."""
    error = math.hypot(*(r["error"] if is_finite(r.get("error")) else 0.0 for r in (one, other)))
    apart = one["value"] - other["value"]
    return 0 if abs(apart) <= error else int(math.copysign(1, apart))


def _list_named(rows: Sequence[Row], name: Callable[[Row], str] = lambda r: r["policy"]) -> str:
    """Up to three names, and how many more there are."""
    names = [name(r) for r in rows[:3]] + ([f"{len(rows) - 3} more"] if len(rows) > 3 else [])
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _write_range(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
    return f"{low}\u00a0%" if low == high else f"{low} to {high}\u00a0%"


def _write_share(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _write_excess(row: Row) -> str:
    """'5.70 ± 1.10 % above dense'."""
    metric = find_metric("over_dense")
    spread = f" ± {metric.spread(row['error'])}" if is_finite(row.get("error")) else ""
    words = f"{metric.show(abs(row['value'])).lstrip('+')}{spread} %".replace(" ", "\u00a0")
    return f"{words} {'below' if row['value'] < 0 else 'above'} dense"


def count_leads(lines: Sequence[SummaryLine]) -> str:
    """In how many lines tokenbutler has the better value, in words; "" where no line compares."""
    both = [line for line in lines if line.butler and line.other]
    if not both:
        return ""
    leads, equal = sum(line.butler_leads is True for line in both), sum(line.butler_leads is None for line in both)
    number = f"the {len(lines)} lines" if len(both) == len(lines) else f"the {len(both)} lines with both values"
    draws = f", and an equal one in {equal}" if equal else ""
    return (
        f"Bold: tokenbutler has a better value than the best other policy, in {leads} of {number}{draws}. "
        "Standard errors are not considered."
    )


def _make_line(
    task: str, rows: Sequence[Row], budget: float | int | None, read: Mapping[tuple[str, Any], float]
) -> SummaryLine:
    """A line of the table. read: the share of dense's bytes by policy and budget."""
    metric = find_metric(rows[0]["metric"], rows)
    butler, other, oracle = compared = _pick_compared(rows, budget)
    dense = next(iter(split_dense(rows)[0]), None)
    best = find_best(metric, [r for r in (butler, other) if r is not None])
    name = metric.title if task in ("perplexity", "attention") else f"{task.replace('_', ' ')}, {metric.title}"
    return SummaryLine(
        what=f"{name} at {format_budget(budget)}" if budget is not None else name,
        butler=_write_named(metric, butler, "tokenbutler"),
        other=_write_named(metric, other, ""),
        oracle=_write_named(metric, oracle, "oracle"),
        dense=_write_value(metric, dense),
        butler_leads=None if len(best) == 2 else butler is not None and butler["policy"] in best,
        bytes=(
            *(f"{_write_share(read[_key(r)])} of bytes" if r and _key(r) in read else "" for r in compared),
            "",
        ),
    )


def _pick_compared(rows: Sequence[Row], budget: float | int | None) -> tuple[Row | None, Row | None, Row | None]:
    """The best tokenbutler, the best other policy and the oracle at a budget."""
    here = [r for r in split_dense(rows)[1] if r["budget"] == budget]
    return _pick_best(here, is_butler), _pick_best(here, _is_other), _pick_best(here, _is_oracle)


def _is_oracle(policy: str) -> bool:
    return policy.split(":")[0] == "oracle"


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
