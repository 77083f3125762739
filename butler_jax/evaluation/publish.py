"""Write what people look at after an evaluation: report.md, report.html and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from butler_jax.evaluation.figures import figures
from butler_jax.evaluation.markdown import markdown
from butler_jax.evaluation.page import page
from butler_jax.evaluation.plotting import plots_available, render
from butler_jax.files import write_whole


def write(report: Any, directory: str | Path) -> list[Path]:
    """Write report.md, report.html and NAME.png a figure into a directory, made where missing; returns the paths.

    report: has rows, arrays and about. Without matplotlib (plots_available) there are no pictures, and the
    page says so. Every file appears whole or not at all.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = figures(report.rows, report.arrays) if plots_available() else None
    pictures, made = None if drawn is None else [], []
    for figure in drawn or ():
        picture, element = render(figure.draw, figure.name, figure.alt)
        made.append(write_whole(directory / f"{figure.name}.png", picture))
        pictures.append((figure, element))
    made.append(write_whole(directory / "report.md", markdown(report, drawn).encode()))
    made.append(write_whole(directory / "report.html", page(report, pictures).encode()))
    return made
