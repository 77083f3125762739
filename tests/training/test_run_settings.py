"""The settings of a run directory are checked before it is used."""

import os

import pytest

from butler_jax.runs.settings import run_config
from butler_jax.storage.json_objects import read_lines
from butler_jax.training.config import TrainConfig
from butler_jax.training.loop import check_run


def test_a_run_of_a_stranger_is_checked(tmp_path):
    path = tmp_path / "config.json"
    for content in ('{"base": 5}', '{"base": ["tiny"]}', '{"base": "tiny", "data": 5}', "[" * 100_000, "[]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            run_config(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold .*; remove it"):
        check_run(tmp_path, TrainConfig())
    path.write_text('{"base": ' + "[" * 900 + "]" * 900 + "}")
    with pytest.raises(ValueError, match=r"other settings .*base: \[\[.* there, 'tiny' now"):
        check_run(tmp_path, TrainConfig())
    for kind in (sparse, os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")):
        path.rmdir() if path.is_dir() else path.unlink()
        kind(path)
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{tmp_path}.* (bytes|no config\.json)"):
            run_config(tmp_path)
        with pytest.raises(ValueError, match=r"config\.json (has \d+ bytes|is no regular file).*; remove it"):
            check_run(tmp_path, TrainConfig())
        with pytest.raises(ValueError, match=r"config\.json(, line 1: more than| is no regular file; move it away)"):
            next(read_lines(path))


def sparse(path):
    """10 GB that take no room."""
    path.touch()
    os.truncate(path, 10 << 30)
