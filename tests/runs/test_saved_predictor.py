"""A predictor that is saved alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from butler_jax import load_base
from butler_jax.cli import main
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.runs.saved_predictor import load_predictor, save_predictor
from butler_jax.runs.settings import run_base, run_data
from tests import tiny_runs


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def make_own(base):
    return make_predictor(base.config, PredictorConfig(kind="producer", rank=4))


def test_a_predictor_is_saved_for_a_base_of_its_sizes_alone(base, tmp_path):
    other = make_predictor(dataclasses.replace(base.config, width=32), PredictorConfig(kind="producer", rank=4))
    for save in (
        lambda: save_predictor(tmp_path / "own", other, base),
        lambda: other.save_pretrained(tmp_path / "own", base),
    ):
        with pytest.raises(ValueError, match=r"of a base of other sizes: .*'width': 32"):
            save()
    assert not (tmp_path / "own").exists()


def test_a_saved_predictor_names_its_base(base, tmp_path):
    own = make_own(base)
    save_predictor(tmp_path / "own", own, base)
    assert run_base(tmp_path / "own") == "tiny" and run_data(tmp_path / "own") == "python_docs"
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(load_predictor(tmp_path / "own")), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(FileExistsError, match="already holds a predictor"):
        save_predictor(tmp_path / "own", own, base)
    own.save_pretrained(tmp_path / "handed", base)
    with pytest.raises(FileExistsError, match="already holds a predictor"):
        save_predictor(tmp_path / "handed", own, base)


def test_a_base_that_is_not_found_is_asked_for(tmp_path, capfd):
    base = load_base(str(tiny_runs.make_base(tmp_path / "my-model")))
    save_predictor(tmp_path / "own", make_own(base), base)
    with pytest.raises(FileNotFoundError, match="own was trained for the base 'my-model'; give it as base="):
        load_predictor(tmp_path / "own")
    assert main(["generate", "--run", str(tmp_path / "own"), "--prompt", "x"]) == 1
    assert "was trained for the base 'my-model'; give it as base= (--base)" in capfd.readouterr().err
    load_predictor(tmp_path / "own", base)


def test_the_tilde_is_the_home_directory(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_predictor("~/own", make_own(base), base)
    make_own(base).save_pretrained("~/handed", base)
    assert (tmp_path / "own/checkpoints").is_dir() and (tmp_path / "handed/config.json").is_file()
    assert tiny_runs.TrainConfig(run_dir="~/run").run_dir == Path(tmp_path / "run")
