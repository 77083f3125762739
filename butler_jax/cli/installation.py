"""What is installed here: versions, devices, and the cache of compiled programs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

PACKAGE = "butler-jax"
BELOW = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
"""Packages that JAX brings, and that results and speed depend on."""


def describe_installation() -> dict[str, Any]:
    """Versions of Python, of this package and of every package it names, devices, variables and caches, JSON-ready.

    A package of an extra that is not installed has the version None.
    """
    from butler_jax.runs import devices, environment, revision

    required, extras = _requirements()
    return {
        PACKAGE: own_version(),
        "git": revision(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in (*required, *(n for n in BELOW if _version(n)))},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in extras.items()},
        "devices": devices(),
        "variables": environment(),
        "compilation_cache": describe_cache(),
    }


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """The names of the packages that are always needed, and those of each extra."""
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in (importlib.metadata.requires(PACKAGE) or ()) if _version(PACKAGE) else ():
        name = re.match(r"[\w.-]+", line)[0]
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", line)
        names = extras.setdefault(extra[1], []) if extra else required
        if name not in names:
            names.append(name)
    return required, extras


def own_version() -> str:
    """The version of this package; "not installed" in a clone."""
    return _version(PACKAGE) or "not installed"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_cache() -> dict[str, Any] | None:
    """The directory of the compilation cache with its programs and their bytes; None where it is off."""
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not place or os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == "false":
        return None
    sizes = [path.stat().st_size for path in Path(place).glob("*-cache")]
    return {"directory": place, "programs": len(sizes), "bytes": sum(sizes)}


def list_installation(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What `describe_installation` found as pairs of a name and a text."""
    git, cache, devices = found["git"], found["compilation_cache"], found["devices"]
    source = "" if git is None else f" (revision {git['revision'][:10]}{' and changes' if git['dirty'] else ''})"
    kinds = ", ".join(f"{count} x {kind}" for kind, count in devices["kinds"].items())
    lines = [
        (PACKAGE, found[PACKAGE] + source),
        ("python", f"{found['python']} on {found['system']}"),
        ("packages", _join(found["packages"])),
        *((f"extra {extra}", _join(names)) for extra, names in found["extras"].items()),
        ("devices", f"{kinds} ({devices['platform']})"),
        ("variables", " ".join(f"{name}={value}" for name, value in found["variables"].items()) or "none"),
    ]
    if cache is None:
        return [*lines, ("programs", "no compilation cache")]
    size = f"{cache['programs']:,} compiled, {cache['bytes'] / 1e6:,.1f} MB"
    return [*lines, ("programs", f"{size}, in {cache['directory']}")]


def _join(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or '(not installed)'}" for name, version in versions.items())
