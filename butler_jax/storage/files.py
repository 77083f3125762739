"""Files that appear whole or not at all, even after a power cut, and safe access to files that others wrote."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable, or choose another directory"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is in the way: choose another directory"),
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the system into one line that names `path`, what is wrong and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it has such a message already
            raise
        remedy = REMEDIES.get(error.errno, "choose another directory")
        raise OSError(f"{path} cannot be written ({os.strerror(error.errno)}); {remedy}") from error


def write_whole(path: Path, content: str | bytes | Callable[[Path], Any]) -> Path:
    """Write a file under a temporary name and rename it, so that no reader, kill or power cut finds half of it.

    content: text, bytes, or a function that writes to the path it is given.

    Raises:
        OSError: There is no room or no permission. The message names the file, and its old content is unchanged.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            if callable(content):
                content(unfinished)
            else:
                unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(unfinished)
            os.replace(unfinished, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return path


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot sync
            raise
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Other kinds are refused, since opening a pipe may block and reading a device may never end. Opening never blocks,
    even where a pipe takes the file's place after the check.

    Raises:
        ValueError: It is a directory, a pipe or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no regular file; move it away")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def file_in(directory: Path, name: str, folder: str = "") -> Path | None:
    """The regular file `name` of a model's directory, or of a folder in it; None where there is none.

    Links are followed within the directory, and from a snapshot in the hub's cache to the blobs beside it.

    Raises:
        ValueError: It is a link that leads elsewhere, or the name contains a path.
    """
    if any(mark in part for part in (name, folder) for mark in "/\\"):
        raise ValueError(f"{directory}: {name!r} is not a file of this directory")
    path = directory / folder / name
    try:
        if not path.is_file():
            return None
    except OSError:  # a name too long for any file
        return None
    home, target = directory.resolve(), path.resolve()
    roots = [home, *([(home.parent.parent / "blobs").resolve()] if home.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(
            f"{path} is a link that leaves its directory, to {target}; copy the file, or give the directory it lies in"
        )
    return path
