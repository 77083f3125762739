"""Builds a source distribution whose bytes are the same wherever it is built, if SOURCE_DATE_EPOCH is set."""

from __future__ import annotations

import gzip
import os
import tarfile
from pathlib import Path

from setuptools.command.sdist import sdist


class ReproducibleSdist(sdist):
    """Writes the archive in the order of names, with one time, no owners, and no permissions but to execute."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """As setuptools does; the time of all files is SOURCE_DATE_EPOCH, where that is set."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = int(epoch), 0, 0, "", ""
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path, top = Path(f"{base_name}.tar.gz"), Path(root_dir or ".")
        names = sorted([base_dir, *(str(found.relative_to(top)) for found in (top / base_dir).rglob("*"))])
        with (
            path.open("wb") as raw,
            gzip.GzipFile("", "wb", mtime=int(epoch), fileobj=raw) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name in names:
                archive.add(top / name, name, recursive=False, filter=plain)
        return str(path)
