"""Digests of a directory's files, which show later whether they still hold what was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from butler_jax.storage import read_object, sync, write_whole

DIGESTS = "digests.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(directory: Path) -> None:
    """Bring a directory's files to the disk and write the digest of each to digests.json."""
    files = sorted(_files(directory))
    for path in (*files, *{p.parent for p in files}):
        sync(path)
    found = {str(path.relative_to(directory)): digest(path) for path in files}
    write_whole(directory / DIGESTS, json.dumps(found, indent=1) + "\n")


def damage(directory: Path, *, only: str | None = None) -> list[str]:
    """What differs from the sealed state (of one file with `only`), a few words for each; empty where nothing does."""
    try:
        sealed = read_object(directory / DIGESTS)
    except FileNotFoundError:
        return [f"{DIGESTS} is missing"]
    except (ValueError, OSError):
        return [f"{DIGESTS} is unreadable"]
    there = {str(path.relative_to(directory)) for path in _files(directory)}
    found = []
    for name in sorted({*sealed, *there} - {DIGESTS}) if only is None else [only]:
        if name not in there:
            found.append(f"{name} is missing")
        elif name not in sealed:
            found.append(f"{name} is not in {DIGESTS}")
        else:
            try:
                if digest(directory / name) != sealed[name]:
                    found.append(f"{name} is not as it was written")
            except OSError as error:
                found.append(f"{name} is unreadable ({error})")
    return found


def _files(directory: Path) -> Iterator[Path]:
    """The regular files below a directory, without links, pipes, devices and hidden files."""
    for place, _, names in os.walk(directory):
        for path in (Path(place) / name for name in names if not name.startswith(".")):
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path
