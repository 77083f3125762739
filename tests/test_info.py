"""`python -m butler_jax.info`: what a run directory says of itself, whatever state it is in."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path

import jax
import pytest
import tiny_runs

from butler_jax import distil, info, load_base
from butler_jax.checkpoints import save_predictor
from butler_jax.command_line import read
from butler_jax.configs import PredictorConfig, PretrainConfig, TrainConfig
from butler_jax.fitting import open_run
from butler_jax.predictors import make_predictor
from butler_jax.run_directory import claim


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict[str, Path]:
    return tiny_runs.make_place(tmp_path_factory.mktemp("info"))


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """A run of 6 steps, saved at 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    config = tiny_runs.settings(place, run_dir, predictor="producer", steps=6, checkpoint_every=2, keep=5)
    distil(load_base(str(place["base"])), config)
    return config, run_dir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """The run, carried elsewhere."""
    return shutil.copytree(trained[1], tmp_path / "copy")


def shown(capsys, *arguments) -> str:
    assert info.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_a_run_explains_itself(trained, place, capsys):
    run_dir = trained[1]
    found = json.loads(shown(capsys, run_dir, "--json"))
    fingerprint = load_base(str(place["base"])).fingerprint
    losses = {row["step"]: row["validation_loss"] for row in tiny_runs.rows(run_dir) if "validation_loss" in row}
    assert found["state"] == "finished, saved up to step 6 of 6"
    assert {one["step"]: one["loss"] for one in found["checkpoints"]} == losses
    for one in found["checkpoints"]:
        assert (one["state"], one["damage"], one["base"], one["fingerprint"]) == ("whole", [], "base", fingerprint)
        files = [path for path in (run_dir / "checkpoints" / str(one["step"])).rglob("*") if path.is_file()]
        assert one["bytes"] == sum(path.stat().st_size for path in files)
        assert one["best"] == (one["loss"] == min(losses.values()))
    (start,) = found["starts"]
    assert (start["from"], start["to"], start["ended"]) == (0, 6, "finished")
    assert start["versions"]["jax"] == jax.__version__ and start["devices"]["kinds"] == {"cpu": len(jax.devices())}
    assert start["fingerprint"] == fingerprint and start["predictor"]["kind"] == "producer"
    assert found["config"] == json.loads((run_dir / "config.json").read_text())
    assert found["metrics"] == tiny_runs.rows(run_dir)[-1]
    assert found["bytes"] == sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
    assert found["evaluate"] == f"python eval.py --run {run_dir}"
    text = shown(capsys, run_dir)
    for words in ("finished, saved up to step 6 of 6", fingerprint, "validation_loss", jax.__version__,
                  start["command"], found["go_on"], found["evaluate"], "predictor producer"):  # fmt: skip
        assert words in text, words


def options(command: str, kind: type, *program: str):
    words = shlex.split(command)
    assert words[: 1 + len(program)] == ["python", *program]
    return read(kind, words[1 + len(program) :], "train.py")


def test_the_command_to_go_on_has_the_settings_of_the_run(trained, copy):
    config = trained[0]
    found = info.inspect(copy)  # the command names the copy
    assert options(found["go_on"], TrainConfig, "train.py") == dataclasses.replace(
        config, run_dir=copy, steps=2 * config.steps
    )
    shutil.rmtree(copy / "checkpoints" / "6")  # unfinished: as many steps as before
    assert options(info.inspect(copy)["go_on"], TrainConfig, "train.py").steps == config.steps


def test_a_pretraining_is_shown_with_its_own_command(tmp_path):
    config = PretrainConfig(run_dir=tmp_path / "run", steps=70, layers=3, data="coreference")
    open_run(tmp_path / "run", config)
    found = info.inspect(tmp_path / "run")
    assert options(found["go_on"], PretrainConfig, "train.py", "pretrain") == config
    assert found["evaluate"] is None and found["checkpoints"] == [] and found["state"] == "saved up to step 0 of 70"
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"")
    assert info.inspect(tmp_path / "run")["evaluate"] == f"python eval.py --base {tmp_path / 'run' / 'model'}"


def test_damage_and_leftovers_are_shown(copy, capsys):
    best = next(one["step"] for one in info.inspect(copy)["checkpoints"] if one["best"])
    others = [step for step in (2, 4, 6) if step != best]
    (copy / "checkpoints" / str(best) / "state" / "_METADATA").unlink()
    (copy / "checkpoints" / str(others[0]) / "_CHECKPOINT_METADATA").write_text("{")
    (copy / "checkpoints" / str(others[1]) / "digests.json").unlink()
    (copy / "checkpoints" / "8.unfinished").mkdir()
    (copy / "damaged" / "1").mkdir(parents=True)
    (copy / "run.json").write_text("[{")
    (copy / "config.json").write_text("{")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    found = info.inspect(copy)
    by_step = {one["step"]: one for one in found["checkpoints"]}
    assert by_step[best]["state"] == "damaged" and by_step[best]["damage"] == ["state/_METADATA is missing"]
    assert by_step[others[0]]["state"] == "damaged" and by_step[others[1]]["state"] == "unchecked"
    assert [one["step"] for one in found["checkpoints"] if one["best"]] == [others[1]]
    assert found["set_aside"] == [str(copy / "damaged" / "1")]
    assert found["unfinished"] == [str(copy / "checkpoints" / "8.unfinished")]
    assert found["metrics"]["step"] == 6 and found["starts"] == [] and found["config"] == {}
    assert [problem.split()[0] for problem in found["problems"]] == ["config.json", "run.json"]
    text = shown(capsys, copy)
    for words in ("state/_METADATA is missing", "unchecked", "config.json is damaged", "run.json is damaged"):
        assert words in text, words


def test_a_run_in_use_is_not_to_be_gone_on_with(copy):
    with claim(copy):
        found = info.inspect(copy)
    assert found["state"].startswith(f"training now (process {os.getpid()} on ") and found["go_on"] is None


def test_a_saved_predictor_is_shown(place, tmp_path):
    base = load_base(str(place["base"]))
    save_predictor(tmp_path / "mine", make_predictor(base.config, PredictorConfig(kind="producer", rank=4)), base)
    found = info.inspect(tmp_path / "mine")
    assert [(one["step"], one["state"]) for one in found["checkpoints"]] == [(0, "whole")]
    assert found["go_on"] is None and found["evaluate"] == f"python eval.py --run {tmp_path / 'mine'} --base BASE"


def test_no_run_is_told_in_one_line(tmp_path, capsys):
    for directory in (tmp_path, tmp_path / "absent"):
        assert info.main([str(directory)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {directory} is no run directory: it has none of config.json, run.json,")
        assert error.count("\n") == 1
