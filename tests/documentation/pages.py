"""The pages of the documentation, the blocks and tables in them, and the rows of the files behind them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Set
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "benchmarks" / "README.md",
    *sorted(p for p in DOCS.rglob("*.md") if not {"_build", "jupyter_execute"} & set(p.parts)),
]


def name(page: Path) -> str:
    """The page's path in the repository, for the names of tests."""
    return str(page.relative_to(REPOSITORY))


def cases(paths: Iterable[Path], name: Callable[[Path], str], often: Set[str]) -> list:
    """Cases of slow tests. `.ci/run` runs those whose name is in `often`, `pytest -m long` the others."""
    return [pytest.param(p, id=name(p), marks=() if name(p) in often else pytest.mark.long) for p in paths]


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language; without a language they are shell text."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def tables(page: Path) -> list[str]:
    """The tables, as their lines stand in the page."""
    return re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)


def rows_of(name: str) -> list[dict]:
    """The rows of a file in benchmarks/."""
    return json.loads((REPOSITORY / "benchmarks" / name).read_text())["rows"]


def cell(row: dict, scale: int = 100, digits: int = 1) -> str:
    """A value and its standard error, as a table shows them."""
    return f"{scale * row['value']:.{digits}f} ± {scale * row['error']:.{digits}f}"
