"""report.html, report.md and their pictures, from the templates beside this file.

report.html is one file without scripts and outside resources, for narrow and wide, light and dark screens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from butler_jax.evaluation.plots import NO_PICTURES, plots_available, render_figure
from butler_jax.evaluation.report.facts import (
    describe_predictors,
    describe_trainings,
    list_facts,
    list_settings,
    name_subject,
)
from butler_jax.evaluation.report.figures import PlannedFigure, plan_figures
from butler_jax.evaluation.report.modes import (
    describe_allocations,
    describe_prompt,
    label_allocations,
    name_prompt,
    split_prompts,
)
from butler_jax.evaluation.report.summary import ERRORS, HEADS, count_leads, make_summary_lines, summarise
from butler_jax.evaluation.report.tables import TASKS, Row, TableCell, is_butler, make_detail_tables, make_tables
from butler_jax.storage import write_whole

TITLE = "# Evaluation of "  # the beginning of report.md
FIGURE_SPACE, THIN_SPACE = "\u2007", "\u2009"
Pictures = Sequence[tuple[PlannedFigure, str]]


def write_pages(report: Any, directory: str | Path) -> list[Path]:
    """Write report.md, report.html and NAME.png for each figure.

    Every file appears whole or not at all. Pictures that only an earlier report.md shows are removed.

    Args:
        report: Has rows, arrays and about.
        directory: Made where it is missing.

    Returns:
        The paths. Without matplotlib there are no pictures, and the pages say so.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = plan_figures(report.rows, report.arrays) if plots_available() else None
    pictures, made = None if drawn is None else [], []
    for figure in drawn or ():
        picture, element = render_figure(figure.draw, figure.name, figure.alt)
        made.append(write_whole(directory / f"{figure.name}.png", picture))
        pictures.append((figure, element))
    former = _find_pictures(directory / "report.md")
    made.append(write_whole(directory / "report.md", render_markdown(report, pictures).encode()))
    made.append(write_whole(directory / "report.html", render_page(report, pictures).encode()))
    for stale in former - set(made):
        stale.unlink(missing_ok=True)
    return made


def render_page(report: Any, pictures: Pictures | None = None) -> str:
    """The text of report.html.

    Args:
        report: Has rows and about.
        pictures: Figures with their <svg> elements; None where matplotlib is missing.
    """
    return _render("report.html.j2", report, pictures)


def render_markdown(report: Any, pictures: Pictures | None = None) -> str:
    """The text of report.md; `pictures` as in `render_page`, their NAME.png beside it."""
    return _render("report.md.j2", report, pictures)


def render_tables(report: Any) -> str:
    """The tables of report.md alone."""
    return _render("tables.md.j2", report, None)


def render_card(report: Any) -> str:
    """The sections Training and Quality of a predictor's model card."""
    return _render("card.md.j2", report, None)


def escape_markdown(text: Any) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _render(template: str, report: Any, pictures: Pictures | None) -> str:
    environment = Environment(
        loader=PackageLoader("butler_jax.evaluation.report"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": escape_markdown, "break_label": _break_label, "pad_spread": _pad_spread}
    environment.tests["butler"] = is_butler
    about, rows = report.about, label_allocations(report.rows)
    groups = split_prompts(rows) or {0: []}
    date = str(about.get("date") or "").replace("T", " ").replace("+00:00", " UTC")
    return environment.get_template(template).render(
        subject=name_subject(about),
        predictors=describe_predictors(about),
        trainings=describe_trainings(about),
        made_on=" · ".join(w for w in (str(about.get("device") or ""), date) if w),
        summaries=[_summarise(own, name_prompt(tokens) if len(groups) > 1 else "") for tokens, own in groups.items()],
        heads=HEADS,
        allocations=describe_allocations(rows),
        no_pictures=NO_PICTURES if pictures is None else "",
        sections=[
            section
            for tokens, own in groups.items()
            for section in _make_sections(own, tokens, len(groups) > 1, pictures)
        ],
        command=about.get("command") or "",
        facts=list_facts(about),
        settings=list_settings(about),
    )


def _summarise(rows: Sequence[Row], prompt: str) -> dict[str, Any]:
    """The sentences and the table of main results of the rows after one prompt; `prompt` names it, or is empty."""
    lines = make_summary_lines(rows)
    notes = (count_leads(lines), ERRORS) if lines else ()
    title = f"Main results {prompt}".rstrip()
    return {"title": title, "sentences": summarise(rows), "lines": lines, "note": " ".join(filter(None, notes))}


def _make_sections(
    rows: Sequence[Row], tokens: int, several: bool, pictures: Pictures | None
) -> Iterator[dict[str, Any]]:
    """A section for each task of the rows after a prompt of some tokens; its name has them where there are several."""
    tables, details = make_tables(rows), make_detail_tables(rows)
    own = [(figure, element) for figure, element in pictures or () if figure.prompt == tokens]
    for task in dict.fromkeys(one.task for one in (*tables, *details, *(figure for figure, _ in own))):
        words = "-".join(task.split()) + (f"-{tokens}" if several else "")
        name = task.replace("_", " ").capitalize()
        yield {
            "id": f"task-{words}",
            "name": f"{name} {name_prompt(tokens)}" if several else name,
            "lead": " ".join(filter(None, (TASKS.get(task, ""), describe_prompt(task, tokens)))),
            "tables": [t for t in tables if t.task == task],
            "details": [t for t in details if t.task == task],
            "figures": [(figure, element) for figure, element in own if figure.task == task],
        }


def _break_label(label: str) -> Markup:
    """A policy's label that may break after a colon or an underscore."""
    return Markup(":<wbr>").join(Markup("_<wbr>").join(part.split("_")) for part in label.split(":"))


def _pad_spread(cell: TableCell, width: int) -> str:
    """An error, padded with figure spaces to `width` so that values stand below each other."""
    if not cell.spread:
        return FIGURE_SPACE * (width + 2)
    return f"±{THIN_SPACE}{cell.spread.rjust(width, FIGURE_SPACE)}"


def _find_pictures(path: Path) -> set[Path]:
    """The pictures that a report.md of `write_pages` shows; none where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return set()
    names = re.findall(r"^!\[.*\]\((\w+\.png)\)$", text, re.MULTILINE) if text.startswith(TITLE) else []
    return {path.with_name(name) for name in names}
