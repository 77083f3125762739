"""Cells of an evaluation: one task under one policy and budget. Finished ones are kept, and not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from butler_jax.simulation import Estimate
from butler_jax.storage import fits, from_dict, parse_object, read_lines

FILE = "cells.jsonl"
LONGEST = 1 << 30  # bytes of a cell with its arrays
Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """One number of a cell: what was measured, at which budget (None: at none), and of which part (`where`).

    attended: the mean fraction of the causal keys read in layers 1 ...; None for those of scores alone (hit_rate).
    """

    metric: str
    estimate: Estimate
    budget: float | int | None
    attended: float | None
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What a task found; arrays: by name, as nested lists. seconds: what it took."""

    findings: list[Finding]
    arrays: dict[str, list] = field(default_factory=dict)
    seconds: float = 0.0


class Kept:
    """Finished cells, by the hash of all they depend on; in a file of one JSON object a line, or in no file (None)."""

    def __init__(self, directory: Path | None):
        self.path = None if directory is None else Path(directory) / FILE
        self.cells: dict[str, Cell] = {}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for number, line in read_lines(self.path, longest=LONGEST) if self.path.is_file() else ():
            try:
                read = parse_object(line, f"{self.path}, line {number}")
                key, cell = read.get("key"), cell_of(read)
                if not isinstance(key, str):
                    raise ValueError("no cell: key")
            except ValueError:
                continue  # cut off while it was written, damaged or of another version: the cell is measured anew
            self.cells[key] = cell

    def add(self, key: str, about: dict[str, Any], cell: Cell) -> None:
        """Keep a cell; about: for people who read the file."""
        self.cells[key] = cell
        if self.path is not None:
            cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * cut + json.dumps({"key": key, **about, **asdict(cell)}) + "\n")


def cell_of(read: dict[str, Any]) -> Cell:
    """A cell from the JSON of dataclasses.asdict. Raises ValueError where it is none."""
    kinds = {"findings": list[dict], "arrays": dict[str, list], "seconds": float}
    wrong = [name for name, kind in kinds.items() if not fits(read.get(name), kind)]
    if not (not wrong and bool(read["findings"])):
        raise ValueError(f"no cell: {', '.join(wrong) or 'no findings'}")
    findings = []
    for one in read["findings"]:
        estimate = one.get("estimate")
        if not (isinstance(estimate, list) and len(estimate) == len(Estimate._fields)):
            raise ValueError("no estimate")
        value, error, *counts = estimate
        numbers = fits(value, float) and fits(error, float | None)
        if not (numbers and all(fits(n, int) for n in counts)):
            raise ValueError("no estimate")
        findings.append(from_dict(Finding, {**one, "estimate": Estimate(*estimate)}))
    return Cell(findings, read["arrays"], read["seconds"])


def key_of(facts: dict[str, Any]) -> str:
    """The hash of JSON-ready facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Progress:
    """Says a line after each cell, with the time that the rest will take if cells of a task cost alike.

    missing: how many cells of each task are to be measured. total: all cells, those that are kept among them. hosts:
    how many measure at the same time.
    """

    def __init__(self, missing: dict[str, int], total: int, say: Say, *, hosts: int = 1):
        self.left, self.total, self.say, self.hosts = dict(missing), total, say, hosts
        self.spent: dict[str, list[float]] = {task: [] for task in missing}
        self.done = 0

    def add(self, task: str, label: str, cell: Cell, *, kept: bool) -> None:
        """A cell is there; kept: it was already."""
        self.left[task] -= not kept
        self.done += 1
        self.spent[task].append(cell.seconds)
        first = cell.findings[0]
        budget = "" if first.budget is None else f"{first.budget:g}"
        place = f"{self.done:{len(str(self.total))}}/{self.total}"
        cost = "kept" if kept else f"{cell.seconds:.0f} s"
        left = f", about {duration(self.seconds_left())} left" if any(self.left.values()) else ""
        self.say(f"[{place}] {task:12} {label:14} {budget:8} {first.metric} {first.estimate.value:.4f}   {cost}{left}")

    def seconds_left(self) -> float:
        """The mean of a task's cells so far for each that is left; for a task not begun, the mean of all cells."""
        seen = [s for spent in self.spent.values() for s in spent]
        overall = sum(seen) / max(len(seen), 1)
        means = {task: sum(spent) / len(spent) if spent else overall for task, spent in self.spent.items()}
        return sum(means[task] * count for task, count in self.left.items()) / self.hosts


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
