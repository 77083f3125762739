"""report.md: the tables of a report, with links to its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from butler_jax.evaluation.report.facts import facts, predictor_words, settings
from butler_jax.evaluation.report.figures import Figure
from butler_jax.evaluation.report.plotting import NO_PICTURES
from butler_jax.evaluation.report.summary import ERRORS, HEADS, Glance, glance, summary
from butler_jax.evaluation.report.tables import TASKS, Cell, Table, detail_tables, is_butler, tables

TITLE = "# Evaluation of "


def markdown(report: Any, pictures: Sequence[Figure] | None = None) -> str:
    """The text of report.md. pictures: figures whose NAME.png lie beside it; None says that matplotlib is missing."""
    lines = [f"{TITLE}{plain(report.about.get('base', 'a base model'))}", ""]
    lines += [plain(predictor_words(report.about)), ""]
    lines += [plain(" ".join(summary(report.rows))), ""]
    lines += _glance(glance(report.rows))
    lines += [plain(NO_PICTURES), ""] if pictures is None else []
    whole, detail = tables(report.rows), detail_tables(report.rows)
    for task in dict.fromkeys(t.task for t in (*whole, *detail, *(pictures or ()))):
        lines += [f"## {plain(task.replace('_', ' ').capitalize())}", ""]
        lines += [TASKS[task], ""] if task in TASKS else []
        for table in (t for t in whole if t.task == task):
            lines += _table(table, 3)
        for figure in (f for f in pictures or () if f.task == task):
            lines += [f"![{plain(figure.alt)}]({figure.name}.png)", "", plain(figure.caption), ""]
        for table in (t for t in detail if t.task == task):
            lines += _table(table, 4)
    lines += ["## How it was made", ""]
    lines += (
        ["```", *str(report.about["command"]).replace("```", "` ` `").splitlines(), "```", ""]
        if report.about.get("command")
        else []
    )
    for name, value in (*facts(report.about), *settings(report.about)):
        lines.append(f"- {plain(name)}: {plain(value)}")
    return "\n".join(lines) + "\n"


def plain(text: Any) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _glance(lines: Sequence[Glance]) -> list[str]:
    if not lines:
        return []
    rows = ["| " + " | ".join(HEADS) + " |", "|---|" + "---:|" * len(HEADS[1:])]
    return [*rows, *("| " + " | ".join(map(plain, (g.what, *g.cells))) + " |" for g in lines), "", ERRORS, ""]


def _table(table: Table, level: int) -> list[str]:
    head = [
        "policy",
        *(" ".join(w for w in (c.label, f"({c.share})" if c.share else "") if w) or "value" for c in table.columns),
    ]
    rows = ["| " + " | ".join(plain(h) for h in head) + " |", "|---|" + "---:|" * len(table.columns)]
    for line in table.lines:
        name = f"**{plain(line.policy)}**" if is_butler(line.policy) else plain(line.policy)
        rows.append("| " + " | ".join([name, *(_cell(c) for c in line.cells)]) + " |")
    return [f"{'#' * level} {plain(table.title)}", "", *rows, "", plain(table.note), ""]


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return (f"**{cell.text}**" if cell.best else cell.text) + (f" ± {cell.spread}" if cell.spread else "")
