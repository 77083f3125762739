"""The rows of an evaluation: shown as tables, written to report.json and to the pages that people read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

from butler_jax.evaluation.report.tables import make_tables
from butler_jax.selection import parse_budget
from butler_jax.storage import fits, read_object, write_whole

MOST_BYTES = 256 << 20
"""The largest report.json that is read."""


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One number of an evaluation.

    Attributes:
        task: The task.
        metric: What was measured.
        policy: The label of the policy.
        budget: A fraction of the causal keys or a number of tokens; None for metrics of scores alone.
        value: The value. In report.json null stands for one that is not finite.
        error: Its standard error; None where a single sequence was seen.
        n: How many tokens, rows or samples the value is a mean of.
        sequences: How many sequences these lie in, over which the error is taken.
        unit: What the sequences are: "windows" of text, "samples", or "overlapping windows", which are not independent.
        seed: Of the samples.
        attended: The share of the causal keys that was read in the served layers: of all rows together in perplexity,
            and else the mean over rows; None for hit_rate and spearman, which are metrics of scores alone.
        where: The part of the task that the row is about; {} for the whole task.
        allocation: How heads share the reads.
        prompt_tokens: First tokens of a window that are read densely and not counted; above 0, everything before a
            sample's answer is.
        attended_of_dense: The keys that were read in all layers, as a share of those that a dense pass reads, like
            `attended`. Rows have it where a layer other than layer 0 is not served.
        tail: Tokens of the spans by which keys that are not read are estimated; 0 where they are not.
    """

    task: str
    metric: str
    policy: str
    budget: float | int | None
    value: float
    error: float | None
    n: int
    sequences: int
    unit: str
    seed: int
    attended: float | None
    where: dict[str, Any]
    allocation: str = "per_head"
    prompt_tokens: int = 0
    attended_of_dense: float | None = None
    tail: int = 0


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        rows: Dicts with the fields of `ReportRow`.
        arrays: {"hit_rate": {policy: a list of heads for each layer from 1 on}, "reads": {policy: an object for each
            budget}}. An object of reads has the budget; heads, the mean share of the keys that is read, a list for each
            layer from 1 on; and positions, the share by position in a window, in bins of bin_size tokens.
            In these lists None stands for a layer that is not served. "reliability": {policy: an object for single keys
            and one for the sums of a row and KV head}, with what the predictor gives ("predicted") and what is true
            ("true"), means over bins by the first, and how many ("count"). "distances": {policy: an object for each
            budget}, with the attention weight of all keys ("true") and of the keys read ("recalled"), and the share of
            the keys read that lies there ("read"), in bins of distances from 2^b to 2^(b+1) tokens, without sinks and
            recent keys.
        about: Base, predictors, policies, versions, device, notes (messages from before the first cell), configuration,
            command and date; the seconds that all cells took when they were measured; and how many cells were measured
            now and how many were kept.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, dict[str, list]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, row: ReportRow) -> None:
        """Append a row."""
        values = asdict(row)
        if row.attended_of_dense is None:
            del values["attended_of_dense"]
        self.rows.append(values)

    def value(self, task: str, policy: str, budget: float | str | None = None, metric: str | None = None) -> float:
        """The value of the first row about a whole task that matches; None matches everything.

        budget: As in EvalConfig, a number or a text such as "1/4".

        Raises:
            KeyError: No row has it. The message lists what the rows have.
            ValueError: The budget is not a number.
        """
        wanted = {"task": task, "policy": policy, "metric": metric}
        wanted["budget"] = None if budget is None else parse_budget(budget)
        whole = [row for row in self.rows if not row["where"]]
        for row in whole:
            if all(v is None or row[k] == v for k, v in wanted.items()):
                return row["value"]
        known = {name: ", ".join(dict.fromkeys(str(row[name]) for row in whole)) or "none" for name in wanted}
        lacking = ", ".join(f"{name} {value!r} (there: {known[name]})" for name, value in wanted.items() if value)
        raise KeyError(f"no row has {lacking}")

    def save(self, directory: str | Path) -> Path:
        """Write report.json, report.md, report.html and a PNG for each figure.

        Args:
            directory: Made where it is missing. Without matplotlib there are no figures.

        Returns:
            The path of report.json.

        Raises:
            ValueError: The directory is a file.
        """
        from butler_jax.evaluation.report.pages import write_pages

        directory = Path(directory).expanduser()
        check_directory(directory)
        path = directory / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{k: None if isinstance(v, float) and not isfinite(v) else v for k, v in r.items()} for r in self.rows]
        whole = {"rows": rows, "arrays": self.arrays, **self.about}
        write_whole(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")
        write_pages(self, directory)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read the report.json that `save` wrote; `path` is the file or its directory. A value of null is NaN.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The file holds no report.
        """
        path = Path(path).expanduser()
        path = path / "report.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"there is no report in {path}; butler-jax eval makes one")
        about = read_object(path, most=MOST_BYTES)
        rows, arrays = about.pop("rows", None), about.pop("arrays", {})
        if not fits(rows, list[dict]) or not isinstance(arrays, dict):
            raise ValueError(f"{path} is no report: it has no rows; give the report.json that butler-jax eval wrote")
        return cls([{**r, "value": nan} if r.get("value", 0.0) is None else r for r in rows], arrays, about)

    def __repr__(self) -> str:
        tasks = ", ".join(dict.fromkeys(row["task"] for row in self.rows)) or "nothing"
        return f"Report({self.about.get('base')!r}: {len(self.rows)} rows of {tasks}; print() shows their tables)"

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the tables of report.md."""
        from butler_jax.evaluation.report.pages import render_tables

        return render_tables(self)

    def card(self) -> str:
        """How the predictor was trained and the main results, as Markdown for a model card."""
        from butler_jax.evaluation.report.pages import render_card

        return render_card(self)

    def print(self, console: Any = None) -> None:
        """Show a table for each task and metric, policies down and budgets across; plain text off a terminal."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        console = console or Console(width=None if Console().is_terminal else 120)
        for one in make_tables(self.rows):
            shown = RichTable(title=one.title, caption=one.note, box=box.SIMPLE_HEAD, title_justify="left")
            shown.add_column("policy")
            for column in one.columns:
                shown.add_column(f"{column.label}\n{column.share}", justify="right")
            for line in one.lines:
                texts = ("" if c is None else " ± ".join(filter(None, (c.text, c.spread))) for c in line.cells)
                shown.add_row(line.policy, *texts)
            console.print(shown)


def check_directory(directory: Path) -> None:
    """Raise ValueError where a report cannot be written into a directory because a part of its path is a file."""
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"{path} is a file, and the report needs a directory; give another with --out, or move the file away"
            )
