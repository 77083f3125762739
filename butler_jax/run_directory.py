"""A training run's directory: held by one process at a time, and with a record of every start in run.json."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from butler_jax import provenance
from butler_jax.files import write_whole, writing
from butler_jax.hosts import gather

LOCK = "lock"
RECORDS = "run.json"


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Make a run directory and hold it: a second process that asks is refused, until this one ends or dies.

    What it made is removed again if no run was begun there (config.json). The first process holds it for all; nobody
    does on file systems without locks. Raises OSError where the directory cannot be written, and ValueError naming the
    process that holds it, in all processes alike.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(_hold(run_dir))
            except (OSError, ValueError) as error:
                problem = error
        if told := gather(str(problem or ""))[0]:
            raise problem or ValueError(told)
        yield


@contextlib.contextmanager
def _hold(run_dir: Path) -> Iterator[None]:
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            file = (run_dir / LOCK).open("a+")
        with file:
            _lock(file, run_dir)
            with writing(run_dir):
                file.truncate(0)
                file.write(f"{os.getpid()} on {platform.node()}")
                file.flush()
            try:
                yield
            finally:
                if not (run_dir / "config.json").exists():
                    (run_dir / LOCK).unlink(missing_ok=True)
    finally:
        for path in made:  # the innermost first; what is not empty stays
            with contextlib.suppress(OSError):
                path.rmdir()


def holder(run_dir: Path) -> str | None:
    """Who holds a run directory, as "PID on HOST"; None where nobody does."""
    try:
        with (run_dir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (run_dir / LOCK).read_text() or "unknown"
    except OSError:
        pass
    return None


def _lock(file: TextIO, run_dir: Path) -> None:
    for waits in (0.2, 0.2, 0.0):  # holder() holds the lock for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(waits)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return  # a file system without locks
            raise
    file.seek(0)
    pid, _, host = file.read().partition(" on ")
    raise ValueError(
        f"{run_dir} is in use by another training, process {pid or 'unknown'} on {host or 'unknown'}; wait until it "
        "ends, stop it (on SIGTERM it saves first), or choose another --run-dir"
    )


@contextlib.contextmanager
def recorded(run_dir: Path, about: dict[str, Any], start: int) -> Iterator[dict[str, Any]]:
    """Add this start to run.json: how it was called, on what, from which step; at the end, to which step and why.

    Yields the record: the caller sets "to" and "ended" when it is done; an error sets "ended" by itself, and after a
    kill it stays None. A damaged run.json is kept as run.json.damaged. The first process writes.
    """
    began = time.monotonic()
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": provenance.command(),
        "directory": str(Path.cwd()),
        "host": platform.node(),
        "pid": os.getpid(),
        "versions": provenance.versions(),
        "git": provenance.revision(),
        "environment": provenance.environment(),
        "devices": provenance.devices(),
        **about,
        "from": start,
        "to": None,
        "ended": None,
    }
    if jax.process_index() != 0:
        yield record
        return
    path, earlier = run_dir / RECORDS, records(run_dir)
    if path.exists() and not earlier:
        os.replace(path, path.with_name(f"{RECORDS}.damaged"))

    def write() -> None:
        record["seconds"] = round(time.monotonic() - began, 1)
        write_whole(path, json.dumps([*earlier, record], indent=1) + "\n")

    write()
    try:
        yield record
    except BaseException as error:
        record["ended"] = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the disk may be what is wrong
            write()
        raise
    write()


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, the oldest first; none where run.json is absent or damaged."""
    try:
        return [dict(record) for record in json.loads((run_dir / RECORDS).read_text())]
    except (OSError, ValueError, TypeError):
        return []
