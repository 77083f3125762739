"""Digests of a directory's files: what is read later is what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from butler_jax.files import sync, write_whole

DIGESTS = "digests.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(directory: Path) -> None:
    """Bring a directory's files to the disk and write the digest of each to digests.json."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    for path in (*files, *{p.parent for p in files}):
        sync(path)
    found = {str(path.relative_to(directory)): digest(path) for path in files}
    write_whole(directory / DIGESTS, json.dumps(found, indent=1) + "\n")


def damage(directory: Path, *, only: str | None = None) -> list[str] | None:
    """What differs from the sealed state, a few words for each file; empty where nothing does, None without a seal.

    only: look at the file of this name alone.
    """
    try:
        sealed = json.loads((directory / DIGESTS).read_text())
        wanted = sorted(sealed.items()) if only is None else [(only, sealed[only])]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError):
        return [f"{DIGESTS} is unreadable"]
    found = []
    for name, expected in wanted:
        try:
            if digest(directory / name) != expected:
                found.append(f"{name} is not as it was written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except (OSError, ValueError) as error:
            found.append(f"{name} is unreadable ({error})")
    return found
