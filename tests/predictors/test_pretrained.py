"""A predictor is handed on as files, and through a hub."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from butler_jax import load_base, load_predictor
from butler_jax.cli import main
from butler_jax.evaluation.report.report import Report
from butler_jax.parallel import hash_arrays
from butler_jax.predictors import PREDICTORS, make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.runs.saved_predictor import save_predictor
from butler_jax.weights.loading import TINY
from tests.tiny_hub import serve
from tests.tiny_reports import rows
from tests.tiny_runs import make_base


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "own-model")


@pytest.fixture(scope="module")
def base(own_model):
    return load_base(own_model)


def make_report() -> Report:
    return Report(rows(("dense", "oracle", "streaming", "tokenbutler")), {}, {"base": "tiny"})


def predictor_for(base, kind="lookahead", rank=4):
    return make_predictor(base.config, PredictorConfig(kind=kind, rank=rank, stride=2), 1)


def same(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one, other)))


@pytest.mark.parametrize("kind", PREDICTORS)
def test_a_predictor_comes_back_exactly(base, tmp_path, kind):
    predictor = predictor_for(base, kind)
    assert predictor.save_pretrained(tmp_path / "out", base) == tmp_path / "out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert same(load_predictor(tmp_path / "out", base), predictor)
    predictor.save_pretrained(tmp_path / "out", base)  # again, over the files


def test_it_is_loaded_for_its_own_base_alone(base, tmp_path):
    pinned = dataclasses.replace(base, name="some/base", revision="abc123")
    predictor_for(base).save_pretrained(tmp_path, pinned)
    other = dataclasses.replace(base, fingerprint="0" * 16)
    with pytest.raises(ValueError, match=r"for base 'some/base@abc123' .*not for 'own-model' .*load that base"):
        load_predictor(tmp_path, other)
    with pytest.raises(ValueError, match="one predictor and no checkpoints"):
        load_predictor(tmp_path, base, step=3)


def test_damaged_files_are_named(base, tmp_path):
    predictor_for(base).save_pretrained(tmp_path, base)
    path = tmp_path / "model.safetensors"
    arrays, whole = load_file(path), path.read_bytes()
    name = next(name for name, array in arrays.items() if array.dtype == np.float32)
    for changed, said in (
        ({**arrays, name: arrays[name] * np.nan}, f"{name} has values that are not finite"),
        ({**arrays, name: arrays[name][:1]}, "does not fit"),
        ({n: a for n, a in arrays.items() if n != name}, f"{name} is missing there"),
        ({**arrays, "more": arrays[name]}, "more is .* unknown here"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=said):
            load_predictor(tmp_path, base)
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_predictor(tmp_path, base)
    path.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": 2}))
    with pytest.raises(ValueError, match=r"has the format 2 of butler-jax .*install that version"):
        load_predictor(tmp_path, base)
    with pytest.raises(ValueError, match="do not say which base and predictor"):
        load_predictor(TINY, base)  # a model is no predictor


def test_the_card_says_base_use_training_and_quality(base, tmp_path):
    report = make_report()
    training = {"step": 300, "steps": 300, "data": "python_docs", "seed": 5}
    config = {"kind": "lookahead", "rank": 4, "training": training}
    report.about.update(fingerprint=base.fingerprint, predictors={"tokenbutler": config}, command="butler-jax eval x")
    pinned = dataclasses.replace(base, revision="abc123")
    predictor_for(base).save_pretrained(tmp_path, pinned, base_id="some/base", report=report)
    card = (tmp_path / "README.md").read_text()
    for words in (
        '\nbase_model: "some/base"\n',
        'load_base("some/base@abc123")',
        base.fingerprint,
        "step 300 of 300",
        "on python_docs",
        "| perplexity over dense",
        "butler-jax eval x",
    ):
        assert words in card, words
    assert "/own-model" not in card and "--base BASE" not in card
    with pytest.raises(ValueError, match=r"the report is about base .*give the report of this predictor"):
        predictor_for(base).save_pretrained(tmp_path, dataclasses.replace(base, fingerprint="f"), report=report)
    report.about["predictors"]["tokenbutler"]["arrays"] = "of another step"
    with pytest.raises(ValueError, match="another step of its training; run butler-jax eval again"):
        predictor_for(base).save_pretrained(tmp_path, pinned, report=report)
    report.about["predictors"]["tokenbutler"]["arrays"] = hash_arrays(predictor_for(base))
    predictor_for(base).save_pretrained(tmp_path, pinned, report=report)
    other = {**config, "arrays": "of another", "training": {"step": 77, "steps": 77}}
    report.about["predictors"]["tokenbutler:compared"] = other
    report.rows.extend([{**row, "policy": "tokenbutler:compared", "value": 1e-9} for row in report.rows])
    predictor_for(base).save_pretrained(tmp_path, pinned, report=report)
    card = (tmp_path / "README.md").read_text()
    assert "compared" not in card and "step 77" not in card and "step 300 of 300" in card
    with pytest.raises(FileExistsError, match="is a run's directory"):
        (tmp_path / "checkpoints").mkdir()
        predictor_for(base).save_pretrained(tmp_path, base)


@pytest.mark.parametrize(
    "there", [{"README.md": "my project"}, {"model.safetensors": "", "config.json": '{"model_type": "llama"}'}]
)
def test_files_of_something_else_are_not_overwritten(base, tmp_path, there):
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match=f"has {sorted(there)[-1]}.*, but not of a predictor; choose another"):
        predictor_for(base).save_pretrained(tmp_path, base)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == there


def test_a_predictor_may_be_written_again(base, tmp_path):
    for _ in range(2):
        predictor_for(base).save_pretrained(tmp_path, base, base_id="some/base")
    assert json.loads((tmp_path / "config.json").read_text())["base"] == "some/base"


def test_an_id_that_is_none_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"base_id='some base' is no id on the hub; give ORGANISATION/NAME"):
        predictor_for(base).save_pretrained(tmp_path / "new", base, base_id="some base")
    assert not (tmp_path / "new").exists()


def test_a_card_without_a_report_says_so(base, tmp_path):
    predictor_for(base).save_pretrained(tmp_path, base)
    card = (tmp_path / "README.md").read_text()
    assert "No report came with this predictor" in card and "base_model" not in card
    assert "`own-model` is the name of local files" in card and "--base BASE" in card


def test_a_report_is_read_again(tmp_path):
    report = Report(make_report().rows[:1], {"hit_rate": {}}, {"base": "tiny"})
    report.save(tmp_path)
    assert Report.load(tmp_path) == Report.load(tmp_path / "report.json") == report
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="is no report: it has no rows"):
        Report.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="butler-jax eval makes one"):
        Report.load(tmp_path / "none")


def test_the_command_publishes_a_run_and_others_take_the_directory(base, own_model, tmp_path, capfd):
    save_predictor(tmp_path / "run", predictor_for(base), base)
    out, where = tmp_path / "out", ["--base", str(own_model)]
    assert main(["publish", "--run", str(tmp_path / "run"), *where, "--out", str(out)]) == 0
    assert "there is no report" in capfd.readouterr().err
    settings = ["--prompt", "the river", "--max-new-tokens", "1"]
    assert main(["generate", "--run", str(out), *where, *settings]) == 0
    assert capfd.readouterr().out.startswith("the river")
    assert main(["info", str(out)]) == 0
    shown = capfd.readouterr().out
    assert "a predictor to hand on" in shown and "problem" not in shown and f"eval --run {out}" in shown
    assert main(["publish", "--run", str(tmp_path / "run")]) == 1
    assert "nowhere to publish: give --out DIR, or --hub" in capfd.readouterr().err


def test_without_the_extra_the_command_to_install_it_is_said(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'butler-jax\[hub\]'"):
        predictor_for(base).push_to_hub("some/predictor", base)
    with pytest.raises(FileNotFoundError, match=r"pip install 'butler-jax\[hub\]'"):
        load_predictor("some/predictor", base)


def test_a_name_below_a_directory_of_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert main(["eval", "--run", "runs/typo"]) == 1
    assert "error: no such directory: runs/typo; give" in capfd.readouterr().err


def test_the_base_of_the_hubs_cache_has_its_name_and_revision(tmp_path):
    place = tmp_path / "models--some--base" / "snapshots" / "abc123"
    make_base(place)
    base = load_base(place)
    assert (base.name, base.revision) == ("some/base", "abc123")


HAND_ON = """
import jax
import butler_jax
from butler_jax.predictors import make_predictor, PredictorConfig

base = butler_jax.load_base("an-org/base")
predictor = make_predictor(base.config, PredictorConfig(rank=4))
print(predictor.push_to_hub("an-org/predictor", base))
again = butler_jax.load_predictor("an-org/predictor", base)
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), predictor, again)))
"""


@pytest.mark.slow
def test_a_predictor_goes_through_the_hub_and_keeps_its_base_pinned(tmp_path):
    """huggingface_hub speaks to a server of this machine: its requests, its cache and its files are the real ones."""
    pytest.importorskip("huggingface_hub")
    files = {path.name: path.read_bytes() for path in TINY.iterdir() if path.is_file()}
    with serve() as hub:
        place = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "none"}

        def run(*command: str) -> SimpleNamespace:
            environment = {**os.environ, **place, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "JAX_PLATFORMS": "cpu"}
            return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)

        revision = hub.commit("an-org/base", files)
        done = run("-c", HAND_ON)
        assert done.returncode == 0, done.stderr
        (sent,) = hub.commits["an-org/predictor"]
        assert done.stdout == f"{hub.address}/an-org/predictor/commit/{sent[0]}\n"
        assert f'load_base("an-org/base@{revision}")' in sent[1]["README.md"].decode()
        assert 'load_predictor("an-org/predictor", base)' in sent[1]["README.md"].decode()
        assert json.loads(sent[1]["config.json"])["revision"] == revision

        # the base moves on: the commands take the revision that the predictor names
        other = {path.name: path.read_bytes() for path in make_base(tmp_path / "other").iterdir()}
        hub.commit("an-org/base", other)
        generate = (
            "-m",
            "butler_jax",
            "generate",
            "--run",
            "an-org/predictor",
            "--prompt",
            "The",
            "--max-new-tokens",
            "2",
        )
        done = run(*generate)
        assert done.returncode == 0 and done.stdout.startswith("The"), done.stderr
        done = run(*generate, "--base", "an-org/base")
        assert done.returncode == 1 and f"trained for base 'an-org/base@{revision}'" in done.stderr
