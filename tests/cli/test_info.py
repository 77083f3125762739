"""`butler-jax info` on run directories in any state."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import jax
import pytest

from butler_jax import distil, load_base
from butler_jax.cli import info
from butler_jax.cli.command_line import read
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.pretraining.config import PretrainConfig
from butler_jax.runs.digests import seal
from butler_jax.runs.directory import claim
from butler_jax.runs.saved_predictor import save_predictor
from butler_jax.training.config import TrainConfig
from butler_jax.training.loop import open_run
from tests import tiny_runs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict[str, Path]:
    return tiny_runs.make_place(tmp_path_factory.mktemp("info"))


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """A run of 6 steps, saved at 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    kind = tiny_runs.predictor_config("producer")
    config = tiny_runs.settings(place, run_dir, predictor=kind, steps=6, checkpoint_every=2, keep=5)
    distil(load_base(str(place["base"])), config)
    return config, run_dir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of the run."""
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
    assert found["evaluate"] == f"butler-jax eval --run {run_dir}"
    text = shown(capsys, run_dir)
    for words in (
        "finished, saved up to step 6 of 6",
        fingerprint,
        "validation_loss",
        jax.__version__,
        start["command"],
        found["go_on"],
        found["evaluate"],
        "predictor producer",
    ):
        assert words in text, words


def options(command: str, kind: type, name: str):
    words = shlex.split(command)
    assert words[:2] == ["butler-jax", name]
    return read(kind, words[2:], "butler-jax")


def test_the_command_to_go_on_has_the_settings_of_the_run(trained, copy):
    config = trained[0]
    found = info.inspect(copy)  # the command names the copy
    assert options(found["go_on"], TrainConfig, "train") == dataclasses.replace(
        config, run_dir=copy, steps=2 * config.steps
    )
    shutil.rmtree(copy / "checkpoints" / "6")  # unfinished: as many steps as before
    assert options(info.inspect(copy)["go_on"], TrainConfig, "train").steps == config.steps
    settings = {**json.loads((copy / "config.json").read_text()), "strict_data": True}
    (copy / "config.json").write_text(json.dumps(settings))
    assert options(info.inspect(copy)["go_on"], TrainConfig, "train").strict_data


def started(copy: Path, **changes) -> None:
    """Changes the last start in run.json."""
    starts = json.loads((copy / "run.json").read_text())
    starts[-1] |= changes
    (copy / "run.json").write_text(json.dumps(starts))


def test_the_commands_begin_in_the_directory_the_run_was_started_from(copy, tmp_path, monkeypatch):
    home = tmp_path / "its home"
    home.mkdir()
    started(copy, directory=str(home))
    found = info.inspect(copy)
    assert found["go_on"].startswith(f"cd '{home}' && butler-jax train --")
    assert found["evaluate"] == f"cd '{home}' && butler-jax eval --run {copy}"
    monkeypatch.chdir(home)
    assert info.inspect(copy)["go_on"].startswith("butler-jax train --")
    monkeypatch.undo()
    home.rmdir()  # another machine
    assert info.inspect(copy)["go_on"].startswith("butler-jax train --")
    started(copy, directory="\0")
    assert info.inspect(copy)["go_on"].startswith("butler-jax train --")


def test_each_of_several_processes_is_told_to_give_its_own_index(copy):
    config = json.loads((copy / "config.json").read_text())
    for given, shown, note in (
        ("10.0.0.1:1234,4,0", "10.0.0.1:1234,4,INDEX", "  # on every host, INDEX is its own number: 0 ... 3"),
        ("auto", "auto", ""),
        ("no address", "'no address'", ""),
    ):
        (copy / "config.json").write_text(json.dumps({**config, "distributed": given}))
        command = info.inspect(copy)["go_on"]
        assert f"--distributed {shown}" in command and command.partition("  #")[1:] == note.partition("  #")[1:]


def test_finished_is_what_is_saved_to_the_last_step(copy):
    path = copy / "checkpoints" / "6" / "digests.json"
    digests = path.read_text()
    path.unlink()
    assert info.inspect(copy)["state"] == "damaged since it finished, saved up to step 4 of 6"
    (copy / "config.json").rename(copy / "kept")
    assert info.inspect(copy)["state"] == "damaged since it finished, saved at step 4"
    path.write_text(digests)
    assert info.inspect(copy)["state"] == "finished, saved at step 6"
    (copy / "config.json").write_text(json.dumps({**json.loads((copy / "kept").read_text()), "steps": 9}))
    assert info.inspect(copy)["state"] == "given more steps since it finished, saved up to step 6 of 9"
    (copy / "kept").rename(copy / "config.json")
    shutil.rmtree(copy / "checkpoints")
    assert info.inspect(copy)["state"] == "damaged since it finished, saved up to step 0 of 6"


def test_without_a_whole_checkpoint_no_command_is_named(copy, report):
    for path in (copy / "checkpoints").glob("*/digests.json"):
        path.unlink()
    found, text = report()
    assert found["go_on"] is None and found["evaluate"] is None and "to go on" not in text
    assert found["problems"] == [f"no checkpoint is whole; to start again, remove {copy}, or choose another --run-dir"]


def test_the_base_is_told_without_a_checkpoint(trained, place, copy, report):
    shutil.rmtree(copy / "checkpoints")
    line = f"base         base (fingerprint {load_base(str(place['base'])).fingerprint})"
    assert line in report()[1].splitlines()
    started(copy, base={"layers": 2})  # a pretraining has no base
    assert "\nbase " not in report()[1]


def test_a_renamed_checkpoint_is_damaged(copy, report):
    (copy / "checkpoints" / "6").rename(copy / "checkpoints" / "999")
    for name in ("0008", "\N{ARABIC-INDIC DIGIT EIGHT}", "9" * 250):  # no names of checkpoints
        (copy / "checkpoints" / name).mkdir()
    found, text = report()
    assert [(one["step"], one["damage"]) for one in found["checkpoints"]] == [
        (2, []),
        (4, []),
        (999, ["it was saved as step 6"]),
    ]
    assert found["state"] == "damaged since it finished, saved up to step 4 of 6" and "it was saved as step 6" in text


def test_numbers_that_are_not_finite_leave_the_json_valid(copy, capsys):
    def refuse(name):
        raise ValueError(name)

    (copy / "metrics.jsonl").write_text('{"step": NaN, "loss": Infinity, "seconds": -Infinity}\n')
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "learning_rate": float("nan")}))
    started(copy, more=[float("inf")])
    found = json.loads(shown(capsys, copy, "--json"), parse_constant=refuse)
    assert found["metrics"] == {"step": "nan", "loss": "inf", "seconds": "-inf"} and found["problems"] == []
    assert found["config"]["learning_rate"] == "nan" and found["starts"][-1]["more"] == ["inf"]
    assert "loss inf" in shown(capsys, copy)


def test_checkpoints_that_are_no_directory_are_a_problem(copy, report):
    shutil.rmtree(copy / "checkpoints")
    for make in (lambda path: path.write_text(""), lambda path: path.symlink_to("nowhere")):
        make(copy / "checkpoints")
        found, text = report()
        assert found["problems"] == ["checkpoints is no directory; move it away to go on"]
        assert f"problem      {found['problems'][0]}" in text
        (copy / "checkpoints").unlink()


def test_a_pretraining_is_shown_with_its_own_command(tmp_path):
    config = PretrainConfig(run_dir=tmp_path / "run", steps=70, layers=3, data="coreference")
    open_run(tmp_path / "run", config)
    found = info.inspect(tmp_path / "run")
    assert options(found["go_on"], PretrainConfig, "pretrain") == config
    assert found["evaluate"] is None and found["checkpoints"] == [] and found["state"] == "saved up to step 0 of 70"
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"")
    assert info.inspect(tmp_path / "run")["evaluate"] == f"butler-jax eval --base {tmp_path / 'run' / 'model'}"


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
    assert by_step[others[0]]["state"] == "damaged" and by_step[others[1]]["damage"] == ["digests.json is missing"]
    assert not any(one["best"] for one in found["checkpoints"])
    assert found["set_aside"] == [str(copy / "damaged" / "1")]
    assert found["unfinished"] == [str(copy / "checkpoints" / "8.unfinished")]
    assert found["metrics"]["step"] == 6 and found["starts"] == [] and found["config"] == {}
    assert [problem.split()[0] for problem in found["problems"]] == ["config.json", "run.json", "no"]
    text = shown(capsys, copy)
    for words in (
        "state/_METADATA is missing",
        "digests.json is missing",
        "config.json is damaged",
        "run.json is damaged",
    ):
        assert words in text, words


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


HOSTILE = {
    "brackets": lambda path: path.write_text("[" * 200_000),
    "nested": lambda path: path.write_text('{"a": ' + "[" * 900 + "]" * 900 + "}"),
    "a list of nothing": lambda path: path.write_text("[null]"),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
    "half a character": lambda path: path.write_text('{"a": "\\ud800"}'),
    "long": sparse,
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a directory": lambda path: path.symlink_to("/"),
}


@pytest.fixture
def report(copy, capsys):
    """Inspects the copy and prints it both ways: (what was found, the text)."""

    def made() -> tuple[dict, str]:
        signal.alarm(60)  # instead of a hang
        try:
            text = shown(capsys, copy)
            return json.loads(shown(capsys, copy, "--json")), text
        finally:
            signal.alarm(0)

    return made


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl"])
def test_a_hostile_file_is_a_problem_and_the_rest_is_shown(copy, report, name, kind):
    (copy / name).unlink()
    HOSTILE[kind](copy / name)
    if name == "metrics.jsonl" and (copy / name).is_file() and kind not in ("long", "brackets"):
        with (copy / name).open("a") as file:
            file.write("\n")  # without, it is the line that a kill cut off
    found, text = report()
    (problem,) = found["problems"]
    assert problem.startswith(f"{name} is damaged (") and f"problem      {problem}" in text
    assert [one["state"] for one in found["checkpoints"]] == ["whole"] * 3
    key, nothing = {"config.json": ("config", {}), "run.json": ("starts", []), "metrics.jsonl": ("metrics", None)}[name]
    assert [part for part in ("config", "starts", "metrics") if not found[part]] == [key] and found[key] == nothing


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["digests.json", "_CHECKPOINT_METADATA"])
def test_a_hostile_file_of_a_checkpoint_is_its_damage(copy, report, name, kind):
    (copy / "checkpoints" / "4" / name).unlink()
    HOSTILE[kind](copy / "checkpoints" / "4" / name)
    if kind == "long":
        os.truncate(copy / "checkpoints" / "4" / name, 1 << 30)  # its digest is taken
    found, text = report()
    damaged = found["checkpoints"][1]
    assert [one["state"] for one in found["checkpoints"]] == ["whole", "damaged", "whole"]
    assert name in damaged["damage"][0] and name in text and not damaged["best"] and found["problems"] == []


@pytest.mark.parametrize(
    "facts",
    [
        None,
        5,
        [],
        "metrics",
        {},
        {"metrics": None},
        {"metrics": []},
        {"metrics": {"loss": "low"}},
        {"metrics": {"loss": [1.0]}},
        {"metrics": {"loss": 10**400}},
        {"metrics": {"loss": True}},
        {"metrics": {}},
        {"metrics": {"loss": float("nan")}, "base": 5, "fingerprint": {}},
    ],
)
def test_a_sealed_checkpoint_without_a_loss_is_damaged(copy, report, facts):
    path = copy / "checkpoints" / "4"
    for written in ({"custom_metadata": facts}, {"metadata": facts}, [facts]):
        (path / "_CHECKPOINT_METADATA").write_text(json.dumps(written))
        (path / "digests.json").unlink()
        seal(path)  # with valid digests
        found, text = report()
        one = found["checkpoints"][1]
        assert (one["state"], one["loss"], one["base"], one["best"]) == ("damaged", None, None, False)
        assert one["damage"][0].startswith("what it says of itself is unreadable (") and "what it says of" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": "abc"}, "steps must be a whole number of at least 1, got 'abc'"),
        ({"steps": None}, "steps must be"),
        ({"steps": 0}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"steps": 1e9}, "steps must be"),
        ({"predictor": 5}, "'predictor' cannot be 5"),
        ({"predictor": "x"}, "'predictor' cannot be {'kind': 'x', "),
        ({"base": ["a"]}, "'base' cannot be ['a']"),
        ({"predictor": {"kind": "producer", "rank": "4"}}, "'predictor' cannot be"),
        ({"selection": 5}, "'selection' cannot be"),
        ({"mesh": {"a": 1}}, "'mesh' cannot be"),
        ({"data_dir": 5}, "'data_dir' cannot be 5"),
        ({"more": json.loads("[" * 30 + "]" * 30)}, "'more' cannot be"),
    ],
)
def test_settings_of_the_wrong_type_are_a_problem(copy, report, changes, words):
    whole = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**whole, **changes}))
    found, _ = report()
    assert words in found["problems"][0] and found["config"] == {} and found["go_on"] is None


@pytest.mark.parametrize("config", [{}, {"predictor": "lookahead"}, {"vocab_size": 5}, {"steps": 5}])
def test_settings_that_lack_what_a_run_has_are_a_problem(copy, report, config):
    (copy / "config.json").write_text(json.dumps(config))
    found, _ = report()
    assert found["problems"][0].startswith("config.json is damaged (") and found["go_on"] is None


@pytest.mark.parametrize(
    "record",
    [
        5,
        "a",
        ["ab"],
        {"git": "x", "devices": "y"},
        {"git": {"revision": 5}},
        {"devices": {"kinds": []}},
        {"devices": []},
        {"date": 5},
        {"host": ["a"]},
        {"ended": 1},
        {"directory": 5},
        {"command": {}},
        {"from": "0"},
        {"to": 1.5},
        {"versions": "1"},
        {"environment": [1]},
        {"more": json.loads("[" * 30 + "]" * 30)},
    ],
)
def test_a_start_of_the_wrong_type_is_a_problem(copy, report, record):
    (start,) = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps([start, record]))
    found, _ = report()
    assert found["problems"][0].startswith(f"run.json is damaged ({copy}/run.json: start 2") and found["starts"] == []


def test_starts_with_fields_that_are_absent_or_null_are_shown(copy, report):
    fields = json.loads((copy / "run.json").read_text())[0]
    (copy / "run.json").write_text(json.dumps([{}, dict.fromkeys(fields)] + [{"host": f"h{n}"} for n in range(60)]))
    found, text = report()
    assert found["problems"] == [] and len(found["starts"]) == 62
    assert "starts (the last 50 of 62)" in text and "h10" in text and "h9 " not in text


def test_what_is_printed_does_not_steer_the_terminal(copy, report):
    (start,) = json.loads((copy / "run.json").read_text())
    texts = {"host": "[/red]\x1b[2J", "command": "[bold]\x1b]0;x\x07", "directory": "a" * 300_000 + "\0"}
    (copy / "run.json").write_text(json.dumps([{**start, **texts}]))
    (copy / "damaged" / os.fsdecode(b"\xff\x1b")).mkdir(parents=True)
    _, text = report()
    assert "[/red]" in text and "[bold]" in text and "\x1b" not in text and len(text) < 50_000


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        (b"", False),
        (b'{"step": 7, "lo', False),
        (b'{"step": 7}\n', False),
        (b'{"step": 7, "lo\n', True),
        (b"[" * 200_000, True),
        (b"[" * 200_000 + b"\n", True),
        (b'{"step": {}}\n', True),
        (b"\0" * 100_000, True),
        (b"5\n" * 900, True),
        (b'{"step": 7, "loss": 1' + b"0" * 400 + b"}\n", False),
    ],
)
def test_the_last_row_is_found_before_what_is_damaged(copy, report, end, problem):
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(end)
    found, _ = report()
    assert found["metrics"]["step"] == 6 + (b"7" in end and end.endswith(b"}\n"))
    assert [one.split(" (")[0] for one in found["problems"]] == ["metrics.jsonl is damaged"] * problem


def test_only_the_end_of_long_metrics_is_read(copy, report):
    row = (copy / "metrics.jsonl").read_bytes().splitlines()[-1]
    sparse(copy / "metrics.jsonl")
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b"\n" + row + b"\n")
    found, _ = report()
    assert found["metrics"] == json.loads(row) and found["problems"] == []


def test_other_things_where_files_are_expected(copy, report):
    (copy / "lock").unlink()
    os.mkfifo(copy / "lock")
    (copy / "checkpoints" / "7").write_text("a file")
    os.mkfifo(copy / "checkpoints" / "8")
    (copy / "checkpoints" / "9").symlink_to("/dev/zero")
    deep = [copy / "damaged" / "/".join("d" * levels) for levels in range(1200)]  # deeper than Python calls itself
    for place in deep:
        place.mkdir()
    try:
        found, _ = report()
    finally:
        for place in reversed(deep):  # pytest cannot
            place.rmdir()
    assert [(one["step"], one["state"]) for one in found["checkpoints"]] == [
        (2, "whole"),
        (4, "whole"),
        (6, "whole"),
        (7, "damaged"),
        (8, "damaged"),
        (9, "damaged"),
    ]


def test_a_run_in_use_is_not_to_be_gone_on_with(copy):
    with claim(copy):
        found = info.inspect(copy)
    assert found["state"].startswith(f"training now (process {os.getpid()} on ") and found["go_on"] is None


def test_a_saved_predictor_is_shown(place, tmp_path):
    base = load_base(str(place["base"]))
    save_predictor(tmp_path / "mine", make_predictor(base.config, PredictorConfig(kind="producer", rank=4)), base)
    found = info.inspect(tmp_path / "mine")
    assert [(one["step"], one["state"]) for one in found["checkpoints"]] == [(0, "whole")]
    assert found["go_on"] is None and found["evaluate"] == f"butler-jax eval --run {tmp_path / 'mine'} --base BASE"


def test_a_base_model_is_no_damaged_run(place, capsys):
    assert info.main([str(place["base"])]) == 1
    assert "is no run directory: its config.json is not that of a training; give" in capsys.readouterr().err


def test_no_run_is_told_in_one_line(tmp_path, capsys):
    for directory in (tmp_path, tmp_path / "absent"):
        assert info.main([str(directory)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {directory} is no run directory: it has none of config.json, run.json,")
        assert error.count("\n") == 1


def test_without_a_directory_the_installation_is_shown(capsys):
    assert info.main([]) == 0
    shown = capsys.readouterr().out
    for name in ("jax", "jaxlib", "flax", "tokenizers", "jinja2"):
        assert f"{name} {importlib.metadata.version(name)}" in shown
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["jax"] == jax.__version__ and set(found["extras"]) >= {"hub", "gguf", "harness", "test"}
    assert found["devices"]["platform"] == "cpu"
