"""Results as rows: tables on the screen, report.json, and the pages that publish.py writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from butler_jax.evaluation.report.tables import tables
from butler_jax.storage import write_whole

FIELDS = ("task", "metric", "policy", "budget", "value", "error", "n", "sequences", "unit", "seed", "attended", "where")


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    rows: dicts of FIELDS. error: the standard error, None where one sequence was seen. n: tokens, rows or samples that
    the value is a mean of. sequences: how many sequences they lie in, over which the error is taken. unit: what these
    are: "windows" of text, "samples", or "overlapping windows", which are not independent. attended: the mean fraction
    of the causal keys read in layers 1 ...; None for hit_rate and spearman, which are of scores alone. where: {} for
    the whole task, or the part of it that the row is about.

    arrays: {"hit_rate": {policy: a list of heads for each layer from 1 on}}. about: base, predictors, policies,
    versions, device, notes (what was said before the first cell), configuration, command, date; seconds that all cells
    took when they were measured, and how many were measured now and how many kept.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, dict[str, list]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, *values: Any) -> dict[str, Any]:
        """Append a row given in the order of FIELDS, and return it."""
        self.rows.append(dict(zip(FIELDS, values, strict=True)))
        return self.rows[-1]

    def value(self, task: str, policy: str, budget: float | None = None, metric: str | None = None) -> float:
        """One number; the first metric of the task unless named. Raises KeyError where no row has it."""
        for row in self.rows:
            wanted = {"task": task, "policy": policy, "budget": budget, "metric": metric}
            if not row["where"] and all(v is None or row[k] == v for k, v in wanted.items()):
                return row["value"]
        raise KeyError(f"no row for task {task!r}, policy {policy!r}, budget {budget!r}, metric {metric!r}")

    def save(self, directory: str | Path) -> Path:
        """Write report.json, report.md, report.html and a PNG a figure into a directory, made where missing.

        Returns the path of report.json. Without matplotlib there are no figures. Raises ValueError where the directory
        is a file.
        """
        from butler_jax.evaluation.report.publishing import write

        check_directory(Path(directory))
        path = Path(directory) / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"rows": self.rows, "arrays": self.arrays, **self.about}
        write_whole(path, json.dumps(whole, indent=1) + "\n")
        write(self, directory)
        return path

    def print(self, console: Any = None) -> None:
        """Show a table a task and metric: policies down, budgets across; plain text off a terminal."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = console or Console(width=None if Console().is_terminal else 120)
        for one in tables(self.rows):
            shown = Table(title=one.title, caption=one.note, box=box.SIMPLE_HEAD, title_justify="left")
            shown.add_column("policy")
            for column in one.columns:
                shown.add_column(f"{column.label}\n{column.share}", justify="right")
            for line in one.lines:
                texts = ("" if c is None else " ± ".join(filter(None, (c.text, c.spread))) for c in line.cells)
                shown.add_row(line.policy, *texts)
            console.print(shown)


def check_directory(directory: Path) -> None:
    """Raise ValueError where a report cannot be written there, for it or a part of its path is a file."""
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"{path} is a file, and the report needs a directory; give another with --out, or move the file away"
            )
