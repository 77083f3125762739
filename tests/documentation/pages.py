"""The pages of the documentation, and the blocks and tables in them."""

from __future__ import annotations

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
