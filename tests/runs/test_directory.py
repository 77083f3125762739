"""Run directories: one process at a time, and a record of every start."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import filelock
import pytest

from butler_jax.runs.directory import claim, holder, read_records, recorded, records

HOLDS = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()} on elsewhere")
file.flush()
print("held", flush=True)
time.sleep(100)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    other = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert holder(tmp_path) == f"{other.pid} on elsewhere"
        words = (
            rf"{tmp_path} is in use by another training, process {other.pid} on elsewhere; wait .* another --run-dir"
        )
        with pytest.raises(ValueError, match=words), claim(tmp_path):
            pass
        assert holder(tmp_path) == f"{other.pid} on elsewhere"  # asking changed nothing
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert holder(tmp_path) is None
    with claim(tmp_path):
        assert holder(tmp_path).startswith(f"{os.getpid()} on ")
    assert holder(tmp_path) is None and (tmp_path / "config.json").exists()


def test_a_directory_without_a_run_is_left_as_it_was(tmp_path):
    with pytest.raises(RuntimeError), claim(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one").is_dir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path):  # it was there before
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_whose_run_is_refused_is_left_as_it_was(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="other settings"), claim(tmp_path):
        raise ValueError("other settings")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_file_systems_without_locks_do_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claim(tmp_path), claim(tmp_path):
        assert holder(tmp_path) is None


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for below in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=rf"{below} cannot be written \(.*\); a file is in the way"), claim(below):
            pass
    for number, words in ((errno.EACCES, "make it writable"), (errno.ENOSPC, "free some space")):

        def mkdir(self, *_, number=number, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
        with pytest.raises(OSError, match=rf"{tmp_path}/new cannot be written .*{words}"), claim(tmp_path / "new"):
            pass


def test_every_start_is_recorded_with_its_end(tmp_path):
    with recorded(tmp_path, {"base": "mine"}, 0) as record:
        (running,) = json.loads((tmp_path / "run.json").read_text())
        assert running["ended"] is None and running["from"] == 0 and running["base"] == "mine"
        record.update(to=8, ended="finished")
    with pytest.raises(ValueError, match="bad luck"), recorded(tmp_path, {}, 8):
        raise ValueError("bad luck")
    first, second = records(tmp_path)
    assert (first["to"], first["ended"], first["pid"]) == (8, "finished", os.getpid())
    assert second["ended"] == "ValueError: bad luck" and second["from"] == 8
    wanted = {"date", "command", "directory", "host", "versions", "git", "environment", "devices", "seconds"}
    assert wanted <= set(first) and wanted <= set(second)


def test_a_damaged_record_is_kept_aside(tmp_path):
    (tmp_path / "run.json").write_text('[{"from": 0, "to')
    assert records(tmp_path) == []
    with recorded(tmp_path, {}, 0) as record:
        record["ended"] = "finished"
    assert (tmp_path / "run.json.damaged").read_text() == '[{"from": 0, "to'
    assert [one["ended"] for one in records(tmp_path)] == ["finished"]


HOSTILE = {
    "brackets": lambda path: path.write_text("[" * 200_000),
    "nested": lambda path: path.write_text('[{"a": ' + "[" * 900 + "]" * 900 + "}]"),
    "types": lambda path: path.write_text('[{"git": "x", "devices": "y"}]'),
    "numbers": lambda path: path.write_text("[1, 2]"),
    "long": lambda path: (path.touch(), os.truncate(path, 10 << 30)),
    "pipe": os.mkfifo,
    "directory": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_record_of_a_stranger_is_kept_aside(tmp_path, kind):
    path = tmp_path / "run.json"
    HOSTILE[kind](path)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_records(tmp_path)
    was = path.lstat()
    with recorded(tmp_path, {}, 0) as record:
        record["ended"] = "finished"
    assert (tmp_path / "run.json.damaged").lstat().st_ino == was.st_ino
    assert [one["ended"] for one in records(tmp_path)] == ["finished"]


def test_a_lock_of_a_stranger_is_not_waited_for(tmp_path):
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / "lock")
        assert holder(tmp_path) is None
        with pytest.raises(ValueError, match=rf"{tmp_path}/lock is no regular file; move it away"), claim(tmp_path):
            pass
        (tmp_path / "lock").rmdir() if (tmp_path / "lock").is_dir() else (tmp_path / "lock").unlink()
    (tmp_path / "lock").write_bytes(b"\xff on \xff" * 1000)
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert holder(tmp_path).startswith("\ufffd on ") and len(holder(tmp_path)) == 1000
        with pytest.raises(ValueError, match="is in use by another training, process \ufffd on"), claim(tmp_path):
            pass


def test_filelock_does_not_keep_these_promises(tmp_path, monkeypatch):
    """To ask who holds a directory, it would leave a file there; and it fails on file systems without locks."""
    assert holder(tmp_path) is None and list(tmp_path.iterdir()) == []
    with filelock.FileLock(tmp_path / "lock", blocking=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="no locks available"):
        filelock.FileLock(tmp_path / "lock", blocking=False).acquire()


def test_a_file_in_the_place_of_checkpoints_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="checkpoints is no directory; move it away"), claim(tmp_path):
        pass
