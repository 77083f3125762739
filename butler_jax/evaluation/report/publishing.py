"""Write what people look at after an evaluation: report.md, report.html and the pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from butler_jax.evaluation.report.figures import figures
from butler_jax.evaluation.report.markdown import TITLE, markdown
from butler_jax.evaluation.report.page import page
from butler_jax.evaluation.report.plotting import plots_available, render
from butler_jax.storage import write_whole


def write(report: Any, directory: str | Path) -> list[Path]:
    """Write report.md, report.html and NAME.png a figure into a directory, made where missing; returns the paths.

    report: has rows, arrays and about. Without matplotlib (plots_available) there are no pictures, and the
    page says so. Every file appears whole or not at all. Pictures that a report.md already there shows, and this one
    does not, are removed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = figures(report.rows, report.arrays) if plots_available() else None
    pictures, made = None if drawn is None else [], []
    for figure in drawn or ():
        picture, element = render(figure.draw, figure.name, figure.alt)
        made.append(write_whole(directory / f"{figure.name}.png", picture))
        pictures.append((figure, element))
    former = _pictures(directory / "report.md")
    made.append(write_whole(directory / "report.md", markdown(report, drawn).encode()))
    made.append(write_whole(directory / "report.html", page(report, pictures).encode()))
    for stale in former - set(made):
        stale.unlink(missing_ok=True)
    return made


def _pictures(path: Path) -> set[Path]:
    """The pictures that a report.md of ours shows; none where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return set()
    names = re.findall(r"^!\[.*\]\((\w+\.png)\)$", text, re.MULTILINE) if text.startswith(TITLE) else []
    return {path.with_name(name) for name in names}
