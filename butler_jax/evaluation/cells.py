"""Cells: the rows of one task under one policy and budget. Finished cells are kept in a file and not measured again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from butler_jax.evaluation.report.report import ReportRow
from butler_jax.storage import fits, from_dict, parse_object, read_lines, writing

FILE = "cells.jsonl"
LONGEST = 1 << 30  # bytes of a cell with its arrays


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Attributes:
        rows: The rows of one task under one policy, at one budget or, where `at_once`, at all.
        arrays: Nested lists by name, such as the hit rate of every layer and head.
        seconds: How long the measurement took.
    """

    rows: list[ReportRow]
    arrays: dict[str, list] = field(default_factory=dict)
    seconds: float = 0.0


class KeptCells:
    """Finished cells by the hash of all they depend on, in a file with one JSON object per line.

    Several evaluations may keep cells in one file at the same time: a line is written under the file's lock.
    """

    def __init__(self, directory: Path | None):
        """Read the cells of a directory; None keeps them in memory alone."""
        self.path = None if directory is None else Path(directory).expanduser() / FILE
        self.cells: dict[str, Cell] = {}
        self._read = 0  # bytes of the file
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Read the cells that other evaluations have added to the file, and those of before."""
        if self.path is None or not self.path.is_file() or self.path.stat().st_size == self._read:
            return
        self._read = self.path.stat().st_size
        for number, line in read_lines(self.path, longest=LONGEST):
            try:
                read = parse_object(line, f"{self.path}, line {number}")
                key, cell = read.get("key"), read_cell(read)
                if not isinstance(key, str):
                    raise ValueError("not a cell: key")
            except ValueError:
                continue  # cut off, damaged or of another version: the cell is measured again
            self.cells[key] = cell

    def add(self, key: str, cell: Cell) -> None:
        """Keep a cell.

        Raises:
            OSError: It cannot be written. The cells of before stay, and a part of a line is not read as a cell.
        """
        self.cells[key] = cell
        if self.path is None:
            return
        line = json.dumps({"key": key, **asdict(cell)}) + "\n"
        with writing(self.path), self.path.open("a+b") as file, locked(file):
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":  # an evaluation ended while it wrote
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
            if end == self._read:  # nobody else has added to it
                self._read = file.tell()


@contextlib.contextmanager
def locked(file: IO) -> Iterator[None]:
    """Hold a file's lock, and wait for it; nothing is held on a file system without locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def read_cell(read: dict[str, Any]) -> Cell:
    """Make a cell from the JSON of dataclasses.asdict.

    Raises:
        ValueError: The object is not a cell.
    """
    kinds = {"rows": list[dict], "arrays": dict[str, list], "seconds": float}
    wrong = [name for name, kind in kinds.items() if not fits(read.get(name), kind)]
    if wrong or not read["rows"]:
        raise ValueError(f"not a cell: {', '.join(wrong) or 'no rows'}")
    return Cell([from_dict(ReportRow, row) for row in read["rows"]], read["arrays"], read["seconds"])
