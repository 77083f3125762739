"""The directory of a training run. One process holds it at a time, and run.json records every start."""

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

from butler_jax.parallel import gather
from butler_jax.runs import provenance
from butler_jax.storage import deeper, fits, open_regular, read_value, shown, write_whole, writing

LOCK = "lock"
LONGEST_NAME = 1000
"""How many bytes of a lock are read to learn who holds it."""

RECORDS = "run.json"
MOST_BYTES = 8 << 20
"""The largest run.json that is read, in bytes; it has room for thousands of starts."""

LEVELS = 20
"""How deep the values of a run's files may be nested. What is written here has four levels."""

FIELDS = {
    "date": str,
    "host": str,
    "command": str,
    "directory": str,
    "ended": str,
    "from": int,
    "to": int,
    "versions": {},
    "environment": {},
    "git": {"revision": str},
    "devices": {"kinds": {}},
}
"""The fields of a start that are read again, with their types; {} is an object. Any may be absent or null."""


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Make a run directory and hold it until this process ends. A second process is refused meanwhile.

    What was made is removed again if no run began there, that is, without a config.json, or where a run of before is
    refused. The first process holds the directory for all. On file systems without locks nobody holds it.

    Raises:
        OSError: The directory cannot be written.
        ValueError: Another process holds it; the message names it. All processes raise alike.
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
            place, lock = run_dir / "checkpoints", run_dir / LOCK
            if place.exists() and not place.is_dir():
                raise ValueError(f"{place} is no directory; move it away")
            if not lock.is_file() and lock.exists():
                raise ValueError(f"{lock} is no regular file; move it away")
            added = (run_dir / "config.json").exists() and not lock.exists()  # to what others may have made
            file = lock.open("a+", errors="replace")
        with file:
            _lock(file, run_dir)
            with writing(run_dir):
                file.truncate(0)
                file.write(f"{os.getpid()} on {platform.node()}")
                file.flush()
            try:
                yield
                added = False
            finally:
                if added or not (run_dir / "config.json").exists():
                    (run_dir / LOCK).unlink(missing_ok=True)
    finally:
        for path in made:  # the innermost first; what is not empty stays
            with contextlib.suppress(OSError):
                path.rmdir()


def holder(run_dir: Path) -> str | None:
    """The process that holds a run directory, as "PID on HOST"; None where none does."""
    try:
        with open_regular(run_dir / LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(LONGEST_NAME).decode(errors="replace") or "unknown"
    except (OSError, ValueError):
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
    pid, _, host = file.read(LONGEST_NAME).partition(" on ")
    raise ValueError(
        f"{run_dir} is in use by another training, process {pid or 'unknown'} on {host or 'unknown'}; wait until it "
        "ends, stop it (on SIGTERM it saves first), or choose another --run-dir"
    )


@contextlib.contextmanager
def recorded(run_dir: Path, about: dict[str, Any], start: int) -> Iterator[Record]:
    """Add this start to run.json: the command, the machine, the steps, and why it ended.

    A damaged run.json is kept as run.json.damaged. Only the first process writes.

    Args:
        about: Further fields of the record.
        start: The step at which training begins.

    Yields:
        The record. The caller sets "to" as it goes, and "ended" when it is done; `write` writes it at once. An error
        sets "ended"; after a kill it is None.
    """
    facts = {
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
    record = Record(run_dir / RECORDS, facts)
    record.write()
    try:
        yield record
    except BaseException as error:
        record["ended"] = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the disk may be what is wrong
            record.write()
        raise
    record.write()


class Record(dict):
    """The record of a start. The first process alone writes it, behind those of earlier starts."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        super().__init__(facts)
        self.path, self.began = path, time.monotonic()
        self.earlier = records(path.parent) if jax.process_index() == 0 else []
        if jax.process_index() == 0 and path.exists() and not self.earlier:
            with writing(path):
                os.replace(path, path.with_name(f"{RECORDS}.damaged"))

    def write(self) -> None:
        """Write it to the file, with the seconds since the start."""
        if jax.process_index() == 0:
            self["seconds"] = round(time.monotonic() - self.began, 1)
            write_whole(self.path, json.dumps([*self.earlier, self], indent=1) + "\n")


def started_elsewhere(starts: list[dict[str, Any]]) -> Path | None:
    """The directory of the last start, where it is another one than the present; None otherwise."""
    with contextlib.suppress(OSError, ValueError):  # no path of this system
        place = Path((starts[-1] if starts else {}).get("directory") or ".")
        if place.is_dir() and place.resolve() != Path.cwd():
            return place
    return None


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, the oldest first; an empty list where run.json is absent or damaged."""
    try:
        return read_records(run_dir)
    except (OSError, ValueError):
        return []


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, the oldest first.

    Raises:
        OSError: run.json is absent or unreadable.
        ValueError: run.json is damaged.
    """
    path = run_dir / RECORDS
    found = read_value(path, most=MOST_BYTES)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} must hold a list of starts, not {shown(found)}")
    for number, record in enumerate(found, 1):
        _check(record, FIELDS, f"{path}: start {number}")
        if deeper(record, LEVELS):
            raise ValueError(f"{path}: start {number} is nested too deeply")
    return found


def _check(values: Any, fields: dict[str, Any], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, not {shown(values)}")
    for name, kind in fields.items():
        if values.get(name) is None:
            continue
        if isinstance(kind, dict):
            _check(values[name], kind, f"{where}, {name}")
        else:
            if not fits(values[name], kind):
                raise ValueError(f"{where}: {name} cannot be {shown(values[name])}; it is {kind.__name__}")
