"""The cache of compiled programs: where it is, what is removed from it, and that later processes read it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import butler_jax
from butler_jax.cli import main
from butler_jax.cli.program import take_option
from butler_jax.storage import compilation_cache
from butler_jax.storage.compilation_cache import choose_cache, default_cache, prepare_cache

NAMES = (
    "BUTLER_COMPILATION_CACHE",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """A user without settings, whose cache is in a directory of the test."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_option_goes_before_the_variables_and_those_before_the_users_directory(monkeypatch, tmp_path):
    assert choose_cache() == default_cache() and default_cache().is_relative_to(tmp_path / "cache" / "butler-jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard tells programs to pass over
    assert choose_cache().is_relative_to(Path.home() / ".cache" / "butler-jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "of-jax")
    assert choose_cache() is None and prepare_cache() is None and os.environ["JAX_COMPILATION_CACHE_DIR"] == "of-jax"
    monkeypatch.setenv("BUTLER_COMPILATION_CACHE", "~/of-butler")
    assert choose_cache() == Path.home() / "of-butler"
    assert choose_cache("asked") == Path("asked")
    assert choose_cache("off") is None
    monkeypatch.setenv("BUTLER_COMPILATION_CACHE", "off")
    assert choose_cache() is None
    assert prepare_cache() is None and os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_jax_is_told_the_directory_and_no_one_else_may_write_there():
    assert prepare_cache() == default_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(default_cache())
    assert default_cache().stat().st_mode & 0o077 == 0


def test_a_directory_that_cannot_be_had_is_an_error_only_where_it_was_asked_for(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("in the way")
    assert prepare_cache() is None
    with pytest.raises(OSError):
        prepare_cache(str(tmp_path / "cache" / "programs"))
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match=r"theirs is not yours, .* give --compilation-cache another directory"):
        prepare_cache(str(tmp_path / "theirs"))


def test_damaged_entries_are_removed_and_those_being_written_stay(tmp_path):
    whole = zlib.compress(b"program" * 100)
    now = time.time()
    contents = {"whole-cache": (whole, 300), "damaged-cache": (whole[:-5], 300), "young-cache": (whole[:-5], 5)}
    for name, (content, age) in contents.items():
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (now - age, now - age))
    prepare_cache(str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["whole-cache", "young-cache"]
    os.utime(tmp_path / "young-cache", (now - 61, now - 61))  # a minute later, the second start
    os.utime(tmp_path / "checked", (now - 100, now - 100))
    prepare_cache(str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["whole-cache"]


def test_what_was_not_used_for_longest_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MOST_BYTES", 250)
    for age in (10, 20, 30, 40):
        path = tmp_path / f"{age}-cache"
        path.write_bytes(zlib.compress(os.urandom(89)))
        os.utime(path, (time.time() - age, time.time() - 40))
    prepare_cache(str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["10-cache", "20-cache"]


def test_a_library_call_changes_jaxs_settings(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        assert butler_jax.use_compilation_cache(tmp_path / "x") == tmp_path / "x"
        assert [getattr(jax.config, name) for name in names] == [str(tmp_path / "x"), True, 0.0]
        jax.jit(lambda x: x * 7 + len(names))(3.0)  # this process has compiled before
        assert list((tmp_path / "x").glob("*-cache"))
        assert butler_jax.use_compilation_cache() == tmp_path / "x"
        assert butler_jax.use_compilation_cache("off") is None
        assert jax.config.jax_enable_compilation_cache is False
        assert butler_jax.use_compilation_cache() is None
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        assert butler_jax.use_compilation_cache() is None
        assert butler_jax.use_compilation_cache(tmp_path / "x") == tmp_path / "x"
        assert jax.config.jax_enable_compilation_cache is True
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def test_every_command_takes_the_option(capsys):
    words = ["eval", "--compilation-cache", "off", "--run", "x"]
    assert take_option(words) == (["eval", "--run", "x"], "off")
    assert take_option(["--compilation-cache=/a", "info"]) == (["info"], "/a")
    assert take_option(["info"]) == (["info"], None)
    assert main(["info", "--compilation-cache"]) == 2
    assert "--compilation-cache needs off or a directory" in capsys.readouterr().err


@pytest.mark.slow
def test_the_second_start_compiles_nothing():
    generate = ["generate", "--base", "tiny", "--prompt", "The file", "--max-new-tokens", "2"]

    def start(*options: str) -> set[str]:
        command = [sys.executable, "-m", "butler_jax", *generate, *options]
        done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
        assert done.returncode == 0 and "Error reading" not in done.stderr, done.stderr
        return {path.name for path in default_cache().glob("*-cache")}

    assert start("--compilation-cache", "off") == set()
    first = start()
    assert len(first) > 5 and start() == first
