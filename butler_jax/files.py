"""Files that appear whole or not at all, and files of a directory that somebody else filled."""

from __future__ import annotations

import os
from pathlib import Path

from butler_jax.configs import require


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file under another name, then give it its own: a reader, or a kill, never finds half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def file_in(directory: Path, name: str) -> Path | None:
    """The regular file `name` of a model's directory; None where there is none.

    Links are followed within the directory, and from a snapshot in the hub's cache to the blobs beside it. Raises
    ValueError for one that leads elsewhere, and for a name with a path in it.
    """
    require("/" not in name and "\\" not in name, f"{directory}: {name!r} is not a file of this directory")
    path = directory / name
    try:
        if not path.is_file():
            return None
    except OSError:  # a name too long for any file
        return None
    home, target = directory.resolve(), path.resolve()
    roots = [home, *([(home.parent.parent / "blobs").resolve()] if home.parent.name == "snapshots" else [])]
    require(
        any(target.is_relative_to(root) for root in roots),
        f"{path} is a link that leaves its directory, to {target}; copy the file, or give the directory it lies in",
    )
    return path
