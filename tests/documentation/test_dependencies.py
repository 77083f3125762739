"""The lower bounds of pyproject.toml are those that were tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent


def test_the_lowest_versions_that_were_tested_are_the_bounds():
    """A version such as 2.0.0 is the bound 2."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(one for name in ("data", "gguf", "hub", "plots") for one in extras[name])]
    tested = dict(line.split("==") for line in (REPOSITORY / "benchmarks" / "lowest_versions.txt").read_text().split())
    for requirement in asked:
        name, bound = re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)", requirement).groups()
        version = tested[name.replace("_", "-").lower()]
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", version), f"{requirement}: {version} was tested"


def test_what_the_package_needs_has_bounds_at_both_ends():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    others = ("test", "docs", "notebooks", "gpu-compiler", "tpu", "cuda")  # tools, and what jax pins itself
    extras = [one for name, asked in project["optional-dependencies"].items() if name not in others for one in asked]
    for requirement in (*project["dependencies"], *extras):
        assert re.match(r"[A-Za-z0-9_-]+>=[0-9.]+,<=?[0-9.]+", requirement), requirement
