"""The settings of a run: those written today, and those written before they were nested."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from butler_jax.cli import main
from butler_jax.cli.info import inspect
from butler_jax.predictors.config import PredictorConfig
from butler_jax.runs.settings import (
    FORMER_NAMES,
    read_settings,
    run_config,
    run_data,
    with_former_defaults,
    with_present_names,
)
from butler_jax.selection.config import AlwaysReadConfig
from butler_jax.storage.json_objects import read_lines
from butler_jax.storage.settings import from_dict, to_dict
from butler_jax.training.config import TrainConfig
from butler_jax.training.loop import check_run, open_run

FORMER = """
{
  "distributed": "", "start_timeout": 300, "host_timeout": 30, "data": "coreference", "data_dir": null, "steps": 50,
  "length": 256, "batch_size": 4, "accumulate": 1, "learning_rate": null, "warmup": 0.1, "weight_decay": 0.01,
  "clip": 10.0, "dtype": null, "mesh": "", "attention": null, "seed": 0, "run_dir": "runs/mine",
  "checkpoint_every": 100, "keep": 2, "eval_every": 0, "log_every": 10, "base": "tiny", "predictor": "producer",
  "rank": 8, "stride": 3, "hidden": 64, "objective": null, "sinks": 2, "window": 16, "calibration": 4
}
"""
"""A config.json as it was written when settings were flat and recent was called window."""

MEANT = TrainConfig(
    data="coreference",
    steps=50,
    length=256,
    eval_every=0,
    reach=0,
    run_dir="runs/mine",
    predictor=PredictorConfig(kind="producer", rank=8, stride=3, hidden=64),
    selection=AlwaysReadConfig(sinks=2, recent=16),
)


@pytest.fixture
def former(tmp_path):
    (tmp_path / "config.json").write_text(FORMER)
    return tmp_path


def test_former_settings_are_read_under_their_present_names(former):
    assert from_dict(TrainConfig, read_settings(former)) == dataclasses.replace(MEANT, run_dir=MEANT.run_dir)
    assert set(FORMER_NAMES) <= set(json.loads(FORMER))
    assert run_config(former)["predictor"]["kind"] == "producer" and run_data(former) == "coreference"


def test_relative_texts_are_those_of_the_directory_where_the_run_began(former, tmp_path, monkeypatch):
    began = tmp_path / "began"
    began.mkdir()
    spec = "text:a.txt,/b/c.txt,-,gs://d/e.jsonl#text:0.7+coreference:0.00003"
    (former / "config.json").write_text(json.dumps({**json.loads(FORMER), "data": spec}))
    (former / "run.json").write_text(json.dumps([{"directory": str(began)}]))
    assert run_data(former) == f"text:{began}/a.txt,/b/c.txt,-,gs://d/e.jsonl#text:0.7+coreference:0.00003"
    monkeypatch.chdir(began)
    assert run_data(former) == spec


def test_present_settings_stay_as_they_are():
    for config in (TrainConfig(), MEANT):
        written = json.loads(json.dumps(to_dict(config)))
        assert with_present_names(written) == written


def test_a_predictor_without_a_target_was_trained_for_attention():
    former = {"kind": "lookahead", "rank": 8, "stride": 4, "hidden": None}
    meant = PredictorConfig(rank=8, stride=4, target="attention")
    assert from_dict(PredictorConfig, with_former_defaults(former)) == meant
    with_values = {**former, "target": "centred", "offset": "share", "value_channels": None}  # 2 was the default then
    assert from_dict(PredictorConfig, with_former_defaults(with_values)) == PredictorConfig(
        rank=8, stride=4, value_channels=2
    )
    settings = {"base": "tiny", "predictor": former}
    assert with_present_names(settings)["predictor"] == with_former_defaults(former)


def test_a_run_of_former_settings_goes_on_with_the_same_and_refuses_others(former):
    check_run(former, dataclasses.replace(MEANT, steps=100))
    for other, words in (
        (dict(predictor=dataclasses.replace(MEANT.predictor, rank=4)), "rank: 8 there, 4 now"),
        (dict(selection=AlwaysReadConfig(sinks=2, recent=8)), "recent: 16 there, 8 now"),
        (dict(reach=None), "reach: 0 there, None now"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({words}\); repeat them to go on"):
            check_run(former, dataclasses.replace(MEANT, **other))
    open_run(former, MEANT)
    assert json.loads((former / "config.json").read_text()) == to_dict(MEANT)


def test_info_tells_how_a_run_of_former_settings_goes_on(former, capsys):
    found = inspect(former)
    assert found["problems"] == []
    for words in ("butler-jax train --data coreference", "--predictor producer", "--rank 8", "--recent 16"):
        assert words in found["go_on"]
    assert main(["info", str(former)]) == 0
    assert "predictor producer, rank 8" in capsys.readouterr().out


def test_a_former_setting_of_the_wrong_type_is_a_problem(former):
    (former / "config.json").write_text(json.dumps({**json.loads(FORMER), "window": "many"}))
    assert "'selection' cannot be {'recent': 'many', 'sinks': 2}" in inspect(former)["problems"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run directory: it has no config.json; give the directory of a run of butler-jax train"),
        ('{"steps": ', r"config\.json is not valid JSON"),
        ('{"steps": 5}', r"config\.json names no base: .* is no run that trained a predictor"),
    ],
)
def test_a_directory_that_is_no_run_is_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_config(tmp_path)


def test_a_run_of_a_stranger_is_checked(tmp_path):
    path = tmp_path / "config.json"
    for content in ('{"base": 5}', '{"base": ["tiny"]}', '{"base": "tiny", "data": 5}', "[" * 100_000, "[]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            run_config(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold .*; remove it"):
        check_run(tmp_path, TrainConfig())
    path.write_text('{"steps": 5, "base": ' + "[" * 900 + "]" * 900 + "}")
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
