"""Sealed directories: every change to a file is found, and the file named."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from butler_jax.runs.digests import DIGESTS, damage, seal


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "deep" / "b").write_bytes(bytes(range(16)))
    (tmp_path / "empty").write_bytes(b"")
    seal(tmp_path)
    return tmp_path


def test_the_digests_are_those_of_sha256(sealed):
    found = json.loads((sealed / DIGESTS).read_text())
    assert found == {
        name: hashlib.sha256((sealed / name).read_bytes()).hexdigest() for name in ("a", "deep/b", "empty")
    }
    assert damage(sealed) == []


def test_every_bit_counts(sealed):
    path = sealed / "deep" / "b"
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert damage(sealed) == ["deep/b is not as it was written"]
        assert damage(sealed, only="a") == []
    path.write_bytes(good)
    assert damage(sealed) == []


def test_what_is_missing_longer_or_shorter_is_named(sealed):
    (sealed / "a").unlink()
    (sealed / "empty").write_bytes(b"x")
    (sealed / "deep" / "b").write_bytes(bytes(range(15)))
    assert damage(sealed) == [
        "a is missing",
        "deep/b is not as it was written",
        "empty is not as it was written",
    ]
    assert damage(sealed, only="a") == ["a is missing"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\x00", "[" * 200_000])
def test_unreadable_digests_are_damage(sealed, content):
    (sealed / DIGESTS).write_text(content)
    assert damage(sealed, only="a") == [f"{DIGESTS} is unreadable"]


def test_a_seal_is_of_all_files(sealed):
    (sealed / "new").write_bytes(b"")
    assert damage(sealed) == [f"new is not in {DIGESTS}"]
    (sealed / DIGESTS).write_text('{"b": 1}')
    assert damage(sealed, only="a") == [f"a is not in {DIGESTS}"]
    (sealed / DIGESTS).write_text("{}")
    assert damage(sealed) == [f"{name} is not in {DIGESTS}" for name in ("a", "deep/b", "empty", "new")]


def test_pipes_devices_and_files_elsewhere_are_not_opened(sealed, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "c"
    outside.write_bytes(b"abc")
    names = ("/dev/zero", f"../{outside.parent.name}/c", str(outside), "pipe", "link")
    os.mkfifo(sealed / "pipe")
    (sealed / "link").symlink_to(outside)
    sealed_as = json.loads((sealed / DIGESTS).read_text())
    (sealed / DIGESTS).write_text(json.dumps({**sealed_as, **dict.fromkeys(names, sealed_as["a"])}))
    assert damage(sealed) == [f"{name} is missing" for name in sorted(names)]
    (sealed / DIGESTS).unlink()
    os.mkfifo(sealed / DIGESTS)
    assert damage(sealed) == [f"{DIGESTS} is unreadable"]


def test_without_digests_all_is_damaged(sealed):
    (sealed / DIGESTS).unlink()
    assert damage(sealed) == damage(sealed, only="a") == [f"{DIGESTS} is missing"]
    (sealed / "file").write_text("")
    assert damage(sealed / "file") == [f"{DIGESTS} is unreadable"] and damage(sealed / "absent")
