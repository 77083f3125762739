"""The provenance that a run records, and what it must not record."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess

import jax

from butler_jax.runs import provenance


def test_versions_are_those_installed():
    found = provenance.versions()
    assert found["jax"] == jax.__version__
    assert {name: found[name] for name in provenance.PACKAGES} == {
        name: importlib.metadata.version(name) for name in provenance.PACKAGES
    }


def test_secrets_stay_out_of_the_environment(monkeypatch):
    told = {"XLA_FLAGS": "--a", "JAX_PLATFORMS": "cpu", "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0"}
    secret = (
        "SLURM_JWT",
        "JAX_AUTH",
        "TPU_API_KEY",
        "XLA_TOKEN",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "HOME",
        "MY_XLA_",
    )
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in {**told, **dict.fromkeys(secret, "hush")}.items():
        monkeypatch.setenv(name, value)
    assert provenance.environment() == told


def test_devices_are_counted_by_kind():
    found = provenance.devices()
    assert sum(found["kinds"].values()) == len(jax.devices()) and found["platform"] == "cpu"
    assert found["processes"] == 1


def test_the_revision_is_that_of_a_checkout_or_none(tmp_path):
    def git(*arguments):
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    source = tmp_path / "provenance.py"
    source.write_text("one")
    assert provenance.revision(tmp_path) is None
    git("init")
    assert provenance.revision(tmp_path) is None  # the checkout of something else
    git("add", ".")
    git("commit", "-m", "one")
    assert provenance.revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("two")
    assert provenance.revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": True}
    assert provenance.revision(tmp_path / "absent") is None
