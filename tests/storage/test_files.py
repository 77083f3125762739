"""Files are written whole or not at all, on full and read-only disks and where a process stops half-way."""

from __future__ import annotations

import errno
import os

import pytest

from butler_jax.storage.files import write_whole


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path):
    write_whole(tmp_path / "a.txt", "old")
    assert write_whole(tmp_path / "a.txt", b"new") == tmp_path / "a.txt"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_content_and_name_are_brought_to_the_disk_in_order(tmp_path, monkeypatch):
    calls = []

    def fsync(descriptor, real=os.fsync):
        calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real(descriptor)

    def replace(source, target, real=os.replace):
        calls.append(("replace", target.name))
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "a.txt", "text")
    unfinished = f".a.txt.{os.getpid()}"
    assert calls == [("fsync", unfinished), ("replace", "a.txt"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "No space left on device.; free some space"), (errno.EROFS, "make it writable")],
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file_and_is_named(tmp_path, monkeypatch, number, remedy, where):
    write_whole(tmp_path / "a.txt", "old")

    def refuses(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, where, refuses)
    with pytest.raises(OSError, match=rf"{tmp_path}/a\.txt cannot be written .*{remedy}"):
        write_whole(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_path_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a\.txt cannot be written .*a file is in the way"):
        write_whole(tmp_path / "file" / "a.txt", "new")
