"""Results as rows, a table on the screen and report.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIELDS = ("task", "metric", "policy", "budget", "value", "error", "n", "seed", "attended", "where")
PACKAGES = ("butler-jax", "jax", "flax", "numpy")


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    rows: dicts {task, metric, policy, budget, value, error, n, seed, attended, where}. error: the standard error, None
    where one sequence was seen. n: tokens, rows or samples that the value is a mean of. attended: the mean fraction of
    the causal keys read in layers 1 .... where: {} for the whole task, or the part of it that the row is about.
    arrays: {"hit_rate": {policy: a list of heads for each layer from 1 on}}. about: base, predictors, policies,
    versions, device, configuration, command, date, seconds.
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
        """Write report.json into a directory, made where missing; returns its path."""
        path = Path(directory) / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"rows": self.rows, "arrays": self.arrays, **self.about}, indent=1) + "\n", encoding="utf-8"
        )
        return path

    def print(self, console: Any = None) -> None:
        """Show a table a task: policies down, budgets across; plain text off a terminal."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = console or Console(width=None if Console().is_terminal else 110)
        groups: dict[tuple[str, str], list[dict]] = {}
        for row in [r for r in self.rows if not r["where"]]:
            groups.setdefault((row["task"], row["metric"]), []).append(row)
        for (task, unit), rows in groups.items():
            budgets = sorted({r["budget"] for r in rows if r["policy"] != "dense"}, key=_width, reverse=True)
            attended = {b: _mean(r["attended"] for r in rows if r["budget"] == b) for b in budgets}
            title = task.replace("_", " ") + ("" if unit in (task, "fraction") else f" ({unit.replace('_', ' ')})")
            table = Table(title=f"{title}, n = {rows[0]['n']:,}", box=box.SIMPLE_HEAD, title_justify="left")
            table.add_column("policy")
            table.add_column("everything", justify="right")
            for budget in budgets:
                table.add_column(f"{budget:g}\n({100 * attended[budget]:.1f} % read)", justify="right")
            for policy in dict.fromkeys(r["policy"] for r in rows):
                cells = {r["budget"]: _show(r["value"], unit) for r in rows if r["policy"] == policy}
                if policy == "dense":
                    table.add_row(policy, cells[1], *[""] * len(budgets))
                else:
                    table.add_row(policy, "", *[cells.get(b, "") for b in budgets])
            console.print(table)


def _width(budget: float | int) -> tuple[bool, float]:
    return isinstance(budget, int), budget


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _show(value: float, unit: str) -> str:
    plain = unit in ("perplexity", "js_divergence", "spearman", "bytes_read")
    return f"{value:.3f}" if plain else f"{100 * value:.2f} %"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
