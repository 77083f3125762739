"""report.html: one file that fetches nothing and runs nothing, for a phone or a desk, by day or by night."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from butler_jax.evaluation.report.facts import facts, predictor_words, settings
from butler_jax.evaluation.report.figures import Figure
from butler_jax.evaluation.report.plotting import NO_PICTURES
from butler_jax.evaluation.report.summary import ERRORS, HEADS, Glance, glance, summary
from butler_jax.evaluation.report.tables import TASKS, Cell, Column, Line, Table, detail_tables, is_butler, tables

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2126; --muted: #5d656e; --line: #d9dcdf;
  --soft: #f2f3f3; --accent: #a84800; --ground: var(--paper); --shade: #0004; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --ink: #e4e6e8; --muted: #a0a8b0; --line: #343a40;
  --soft: #1e2226; --accent: #ff9a4d; --shade: #fff5; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { margin: .2rem 0 .5rem; font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 0 0 .25rem; font-size: 1.35rem; letter-spacing: -.01em; }
p, li { max-width: 46rem; }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--muted); }
section { margin-top: 2.75rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.eyebrow { margin: 0; color: var(--accent); font-weight: 600; font-size: .9rem; }
.about, .lead, .note, figcaption, dt, .share, .spread { color: var(--muted); }
.about, .lead { margin: 0 0 .4rem; }
/* A shade at an edge says that a table goes on there; it lies under the ground's colour at the table's end. */
.summary { --ground: var(--soft); }
.summary { margin: 1.5rem 0; padding: 1rem 1.25rem; background: var(--soft); border-left: 3px solid var(--accent); }
.summary p { margin: 0; max-width: 56rem; }
.summary .scroll, .summary .note { margin-top: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .95rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 2rem 2.5rem;
  margin: 1.5rem 0 2rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .5rem; font-size: .9rem; line-height: 1.45; }
.scroll { margin: 1.75rem 0 0; overflow-x: auto; max-width: 100%; background:
  linear-gradient(to right, var(--ground) 50%, transparent) left / 2.4rem 100% no-repeat local,
  linear-gradient(to left, var(--ground) 50%, transparent) right / 2.4rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .9rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .9rem 100% no-repeat scroll; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; min-width: min(100%, 24rem); font-size: .92rem; line-height: 1.35; }
caption { padding-bottom: .4rem; text-align: left; font-weight: 600; font-size: 1rem; overflow-wrap: normal; }
.note { display: block; font-weight: 400; font-size: .85rem; }
th, td { padding: .32rem .8rem; text-align: right; white-space: nowrap; overflow-wrap: normal; }
thead th { border-bottom: 1px solid var(--ink); font-weight: 600; vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody tr:hover > * { background: var(--soft); }
th:first-child { position: sticky; left: 0; padding-left: 0; background: var(--ground); text-align: left; }
tbody th { font-weight: 400; }
.butler th, .best { font-weight: 700; }
.butler th { color: var(--accent); }
.note.narrow { display: none; }
.share { display: block; font-weight: 400; font-size: .8rem; }
.spread { margin-left: .35em; font-weight: 400; font-size: .85em; }
details { margin-top: 1.75rem; }
summary { cursor: pointer; font-weight: 600; }
.parts { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.parts .scroll { flex: 0 1 auto; }
pre { white-space: pre-wrap; padding: .8rem 1rem; background: var(--soft); font-size: .88rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1.25rem; font-size: .92rem; }
dd { margin: 0; }
@media (max-width: 48rem) { .note.narrow { display: block; } }
@media (max-width: 30rem) { th, td { padding: .32rem .5rem; }
  th:first-child { max-width: 7.5rem; white-space: normal; }
  .summary { padding: .8rem .9rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { details::details-content { content-visibility: visible; block-size: auto; } }
"""


def page(report: Any, pictures: Sequence[tuple[Figure, str]] | None = None) -> str:
    """The text of report.html. pictures: figures with their <svg> elements; None says that matplotlib is missing."""
    about = report.about
    name = about.get("base") or "a base model"
    whole, detail = tables(report.rows), detail_tables(report.rows)
    tasks = list(dict.fromkeys(t.task for t in (*whole, *detail, *(f for f, _ in pictures or ()))))
    date = str(about.get("date") or "").replace("T", " ").replace("+00:00", " UTC")
    lines = " · ".join(w for w in (str(about.get("device") or ""), date) if w)
    links = "".join(f'<a href="#{_id(t)}">{_name(t)}</a>' for t in tasks) + '<a href="#made">How it was made</a>'
    missing = f'<p class="about">{_text(NO_PICTURES)}</p>' if pictures is None else ""
    sections = "".join(
        _section(
            task,
            [t for t in whole if t.task == task],
            [t for t in detail if t.task == task],
            [p for p in pictures or () if p[0].task == task],
        )
        for task in tasks
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of {_text(name)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="eyebrow">TokenButler evaluation</p>
<h1>{_text(name)}</h1>
<p class="about">{_text(predictor_words(about))}</p>
<p class="about">{_text(lines)}</p>
</header>
<main>
{_summary(summary(report.rows), glance(report.rows))}
<nav aria-label="Sections">{links}</nav>
{missing}
{sections}
{_made(about)}
</main>
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _name(task: str) -> str:
    return _text(task.replace("_", " ").capitalize())


def _id(task: str) -> str:
    return _text("task-" + "-".join(task.split()))


def _summary(sentences: Sequence[str], lines: Sequence[Glance]) -> str:
    said = f"<p>{_text(' '.join(sentences))}</p>" if sentences else ""
    heads = "".join(f'<th scope="col">{_text(h)}</th>' for h in HEADS)
    body = "".join(
        f'<tr><th scope="row">{_text(g.what)}</th>'
        + "".join(
            f"<td{' class=best' if i == 0 and g.butler_leads else ''}>{_text(c)}</td>" for i, c in enumerate(g.cells)
        )
        + "</tr>"
        for g in lines
    )
    table = (
        '<p class="note narrow">The table scrolls sideways.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Main results"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="note">{ERRORS}</p>'
    )
    return f'<div class="summary">{said}{table if lines else ""}</div>' if said or lines else ""


def _section(task: str, whole: Sequence[Table], detail: Sequence[Table], pictures: Sequence[tuple[Figure, str]]) -> str:
    lead = f'<p class="lead">{_text(TASKS[task])}</p>' if task in TASKS else ""
    drawn = "".join(
        f"<figure>{svg}<figcaption>{_text(figure.caption)}</figcaption></figure>" for figure, svg in pictures
    )
    parts = "".join(_table(t) for t in detail)
    if parts:
        parts = f'<details><summary>By parts: {len(detail)} tables</summary><div class="parts">{parts}</div></details>'
    return f"""<section id="{_id(task)}">
<h2>{_name(task)}</h2>
{lead}
{f'<div class="figures">{drawn}</div>' if drawn else ""}
{"".join(_table(t) for t in whole)}
{parts}
</section>
"""


def _table(table: Table) -> str:
    heads = "".join(map(_head, table.columns))
    widths = [
        max((len(line.cells[i].spread) for line in table.lines if line.cells[i]), default=0)
        for i in range(len(table.columns))
    ]
    body = "".join(_row(line, widths) for line in table.lines)
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.title)}"><table>
<caption>{_text(table.title)} <span class="note">{_text(table.note)}</span></caption>
<thead><tr><th scope="col">policy</th>{heads}</tr></thead>
<tbody>{body}</tbody>
</table></div>
"""


def _row(line: Line, widths: Sequence[int]) -> str:
    kind = ' class="butler"' if is_butler(line.policy) else ""
    name = _text(line.policy).replace(":", ":<wbr>")
    return f'<tr{kind}><th scope="row">{name}</th>{"".join(map(_cell, line.cells, widths))}</tr>'


def _head(column: Column) -> str:
    share = f'<span class="share">{_text(column.share)}</span>' if column.share else ""
    return f'<th scope="col">{_text(column.label or "value")}{share}</th>'


def _cell(cell: Cell | None, width: int) -> str:
    """A value; its error is padded with figure spaces to `width`, so that values stand below each other."""
    if cell is None:
        return "<td></td>"
    spread = f"±\u2009{cell.spread.rjust(width, chr(0x2007))}" if cell.spread else chr(0x2007) * (width + 2)
    error = f'<span class="spread">{spread}</span>' if width else ""
    return f'<td{" class=best" if cell.best else ""}><data value="{cell.value!r}">{_text(cell.text)}</data>{error}</td>'


def _made(about: Any) -> str:
    command = f"<pre>{_text(about['command'])}</pre>" if about.get("command") else ""
    pairs = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts(about))
    chosen = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in settings(about))
    return f"""<section id="made">
<h2>How it was made</h2>
{command}
<dl>{pairs}</dl>
{f"<h3>Configuration</h3><dl>{chosen}</dl>" if chosen else ""}
</section>
"""
