"""The commands of `butler-jax`: their options, and their messages where an option is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from butler_jax import load_base
from butler_jax.cli import main
from butler_jax.cli.bench_config import BenchConfig
from butler_jax.cli.generate import GenerateConfig
from butler_jax.cli.program import COMMANDS
from butler_jax.evaluation.config import EvalConfig
from butler_jax.predictors import make_predictor
from butler_jax.pretraining.config import PretrainConfig
from butler_jax.runs.saved_predictor import save_predictor
from butler_jax.storage.settings import to_dict
from butler_jax.training.config import TrainConfig
from tests import tiny_runs
from tests.host_devices import host_devices
from tests.marked import slow

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict[str, Path]:
    """A base and a text, another base of the same sizes, and the run directory of a predictor for the first."""
    directory = tmp_path_factory.mktemp("commands")
    found = tiny_runs.make_place(directory)
    found["other"] = tiny_runs.make_base(directory / "other", seed=1)
    found["run"] = directory / "run"
    base = load_base(str(found["base"]))
    config = tiny_runs.predictor_config("producer")
    save_predictor(found["run"], make_predictor(base.config, config), base)
    settings = to_dict(tiny_runs.settings(found, found["run"], predictor=config))
    (found["run"] / "config.json").write_text(json.dumps(settings))
    return found


@pytest.fixture
def fails(capfd):
    """Runs a command that must fail; returns the one line that it printed."""

    def run(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 1
        error = capfd.readouterr().err
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and error.rstrip().endswith(lines[0]), error
        return lines[0]

    return run


def common(place, tmp_path) -> list[object]:
    return [
        "--base",
        place["base"],
        "--data",
        f"text:{place['text']}",
        "--data-dir",
        place["data_dir"],
        "--run-dir",
        tmp_path / "run",
        "--rank",
        4,
        "--length",
        32,
        "--steps",
        2,
        "--mesh",
        "data=1",
    ]


def test_no_such_directory(fails, tmp_path):
    line = fails("train", "--base", tmp_path / "absent", "--run-dir", tmp_path / "run")
    assert f"no such directory: {tmp_path}/absent" in line and "Hugging Face directory, a hub id" in line
    line = fails("eval", "--run", tmp_path / "absent")
    assert f"{tmp_path}/absent" in line and "give the directory of a run of butler-jax train" in line


def test_directory_without_config(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    for line in (fails("train", "--base", tmp_path / "empty"), fails("eval", "--base", tmp_path / "empty")):
        assert f"{tmp_path}/empty" in line and "config.json" in line
    line = fails("eval", "--run", tmp_path / "empty")
    assert "no run directory: it has no config.json; give the directory of a run of butler-jax train" in line


def test_truncated_safetensors(fails, place, tmp_path):
    broken = tiny_runs.make_base(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = fails("train", "--base", broken)
    assert f"{weights}" in line and re.search("truncated|incomplete|download", line)


def test_unknown_family(fails, tmp_path):
    strange = tiny_runs.make_base(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    line = fails("train", "--base", strange)
    assert "mamba" in line and "llama" in line and "qwen2" in line


def test_predictor_of_another_base(fails, place):
    line = fails("eval", "--run", place["run"], "--base", place["other"], "--text", place["text"], "--context", 64)
    assert f"the predictor in {place['run']} was trained for base 'base'" in line
    assert "not for 'other'" in line and "train a predictor for this one" in line


def test_empty_text(fails, place, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    line = fails("train", *common(place, tmp_path), "--data", f"text:{empty}")
    assert str(empty) in line and "empty" in line
    line = fails("eval", "--run", place["run"], "--text", empty, "--context", 64)
    assert str(empty) in line and "empty" in line


def test_length_beyond_the_context(fails, place, tmp_path):
    line = fails("train", *common(place, tmp_path), "--length", 512)
    assert "length 512 is beyond the model's context of 128 tokens; use at most 128" in line
    line = fails("train", *common(place, tmp_path), "--reach", 512)
    assert "--reach 512 is beyond the base's context of 128 tokens" in line
    line = fails("eval", "--run", place["run"], "--context", 512)
    assert "512 is beyond the model's context of 128 tokens" in line
    line = fails("pretrain", "--length", 4096)
    assert "--length 4096 is beyond --context 2048" in line


ZERO = ("steps", "length", "batch-size", "accumulate", "checkpoint-every", "keep", "log-every")


@pytest.mark.parametrize("option", ZERO)
def test_zeros(fails, option):
    assert fails("train", f"--{option}", 0) == f"error: --{option} must be at least 1, got 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["train", "--rank", "5"], "rank must be positive and even, got 5"),
        (["train", "--batch-size", "4", "--accumulate", "3"], "--batch-size 4 is not divisible by --accumulate 3"),
        (["train", "--learning-rate", "-1"], "--learning-rate must be above 0, got -1.0"),
        (["train", "--calibration", "0"], "--calibration must be at least 1, got 0"),
        (["eval"], "nothing to evaluate: give --run DIR (a run of butler-jax train), or --base SPEC"),
        (["eval", "--run", "x", "--budgets", "7"], "a budget of 7 tokens is below 4 sinks + 8 recent = 12"),
        (["eval", "--run", "x", "--budgets", "half"], "budget 'half' is not a number; write a fraction"),
        (
            ["eval", "--run", "x", "--tasks", "chess"],
            "unknown task chess; known: perplexity, attention",
        ),
        (["eval", "--run", "x", "--limit", "4"], "--limit is for the tasks lambada, piqa, winogrande, arc_easy, and"),
        (["eval", "--run", "x", "--context", "1"], "--context must be at least 2 tokens, got 1"),
        (
            ["train", "--distributed", "10.0.0.1,4,0"],
            "is neither auto nor HOST:PORT,COUNT,INDEX, as in 10.0.0.1:1234,4,0",
        ),
        (["eval", "--run", "x", "--distributed", "10.0.0.1:1,4"], "is neither auto nor HOST:PORT,COUNT,INDEX"),
        (["pretrain", "--distributed", "a:1,2,-1"], "is neither auto nor HOST:PORT,COUNT,INDEX"),
        (["train", "--distributed", "a:1,2,2"], "'a:1,2,2': 2 is none of the 2 processes; they are 0 ... 1"),
        (["train", "--distributed", "a:1,0,0"], "'a:1,0,0': the number of processes must be at least 1"),
        (["train", "--distributed", "a:99999,2,0"], "99999 is no port; ports are 1 ... 65535"),
        (["train", "--host-timeout", "0"], "--host-timeout must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(fails, arguments, message):
    assert message in fails(*arguments)


def test_unknown_data_mesh_and_rank_are_named(fails, place, tmp_path):
    given = common(place, tmp_path)
    assert "unknown data 'wiki'; choose python_docs" in fails("train", *given, "--data", "wiki")
    assert "unknown axis 'rows'; axes are data, model" in fails("train", *given, "--mesh", "rows=2")
    assert "--seed must be a number of 64 bits, got 18446744073709551617" in fails(
        "train", *given, "--seed", str(2**64 + 1)
    )
    line = fails("train", *given, "--mesh", "data=64")
    assert "mesh 'data=64' needs 64 devices, but this machine has" in line
    assert "rank 16 exceeds the base's head dimension 8; use at most 8" in fails("train", *given, "--rank", 16)
    line = fails("eval", "--run", place["run"], "--policies", "dense,fortune")
    assert "fortune" in line and "streaming" in line


def test_a_policy_that_was_asked_for_is_not_left_out(fails, place):
    line = fails("eval", "--base", place["base"], "--policies", "dense,tokenbutler")
    assert "the policy tokenbutler needs a trained predictor; give --run RUN" in line and "or another policy" in line


def test_a_bucket_has_to_be_mounted(fails, place, tmp_path):
    given, mount = common(place, tmp_path), "mount the bucket (gcsfuse BUCKET DIRECTORY) and give the path under"
    for option, value in (
        ("--run-dir", "gs://bucket/runs/one"),
        ("--run-dir", "memory://runs/one"),
        ("--base", "gs://bucket/llama"),
        ("--data", f"text:{place['text']},gs://bucket/book.txt"),
    ):
        line = fails("train", *given, option, value)
        assert f"{option} " in line and "bucket" in line and mount in line
    assert mount in fails("eval", "--run", "gs://bucket/runs/one")
    assert mount in fails("eval", "--run", place["run"], "--compare", f"{place['run']},gs://bucket/runs/two")
    assert not list(tmp_path.glob("*:*")) and not Path("gs:").exists() and not Path("memory:").exists()
    # TFDS reads and writes buckets itself
    assert TrainConfig(data_dir="gs://bucket/data").data_dir == "gs://bucket/data"


def test_refused_settings_leave_no_run_behind(fails, place, tmp_path):
    fails("train", *common(place, tmp_path), "--data", "wiki")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_batch_not_divisible_by_the_mesh(place, tmp_path):
    arguments = [*common(place, tmp_path), "--mesh", "data=4", "--batch-size", 6]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "train.py", *map(str, arguments)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": host_devices(4)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = "error: batch size 6 is not divisible by the mesh's data axis (4); use a multiple of 4 or another --mesh"
    assert done.stderr.splitlines()[-1] == message


@pytest.mark.parametrize(("arguments", "message"), [(["--stepz", "3"], "--stepz"), (["--steps", "many"], "many")])
def test_options_that_cannot_be_read_end_with_a_message(arguments, message, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert message in error and "--help" in error and "Traceback" not in error


def flags(config) -> list[tuple[str, object]]:
    """(flag, default) of a configuration and of those nested in it."""
    found = []
    for field in dataclasses.fields(config):
        value = None if field.default is None else getattr(config, field.name)
        name = field.metadata.get("flag", field.name)
        if dataclasses.is_dataclass(value):
            given = field.metadata.get("flags")
            found += [one for one in flags(value) if given is None or one[0].removeprefix("--") in given]
        elif name is not None:
            found.append((f"--{name.replace('_', '-')}", value))
    return found


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("train", TrainConfig()),
        ("pretrain", PretrainConfig()),
        ("eval", EvalConfig()),
        ("generate", GenerateConfig(base="tiny")),
        ("bench", BenchConfig()),
    ],
)
def test_help_explains_every_option_with_its_default(command, config, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capfd.readouterr().out)
    options = flags(config)
    assert len({option for option, _ in options}) == len(options) > 10
    assert "default: None" not in shown  # the explanation says what is taken then
    for option, default in options:
        ends = r" --[a-z]|╰" if default is None else r"\(default: (.*?)\)"
        match = re.search(rf"{option}[ ,].*?({ends})", shown)
        assert match, f"{option} is not explained"
        words = match[0].removesuffix(match[1])[len(option) :]
        assert len(words.split()) >= 3, f"{option} has no explanation: {match[0]}"
        if isinstance(default, (int, float, str)) and (option, default) not in (("--base", "tiny"), ("--mesh", "")):
            assert str(default) in match[1], match[0]


def test_a_mistyped_command_is_told_which_there_are(capsys):
    assert main(["trian"]) == 2
    told = capsys.readouterr().err
    assert told == (
        "error: butler-jax has no command 'trian' (did you mean train?); commands: train, pretrain, eval, generate, "
        "bench, info, publish, lm-eval\n"
    )
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        overview = capsys.readouterr().out
        assert all(f"\n  {name} " in overview for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import butler_jax"],
        ["-m", "butler_jax", "--help"],
        *(["-m", "butler_jax", one, "--help"] for one in ("train", "pretrain", "eval", "generate", "bench", "info")),
        ["-m", "butler_jax", "train", "--stepz", "3"],
        ["-m", "butler_jax", "trian"],
    ],
    ids=" ".join,
)
def test_heavy_packages_are_imported_only_where_they_are_used(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode in (0, 2) and "butler_jax" in imported
    assert not imported & {"jax", "jaxlib", "flax", "orbax", "optax", "grain", "tensorflow_datasets", "numpy", "torch"}


@pytest.mark.parametrize("options", [["--allocations", "per_head"], slow([])], ids=["one", "default"])
def test_training_and_evaluating_from_the_command_line(place, tmp_path, capfd, options):
    assert main([str(a) for a in ("train", *common(place, tmp_path), "--batch-size", 2, "--calibration", 1)]) == 0
    run = tmp_path / "run"
    out = capfd.readouterr().out
    assert f"the best predictor so far is in {run}; evaluate it with: butler-jax eval --run {run}" in out
    assert [row["step"] for row in tiny_runs.rows(run)] == [1, 2]
    arguments = [
        "--run",
        run,
        "--text",
        place["text"],
        "--tasks",
        "perplexity",
        "--context",
        64,
        "--tokens",
        128,
        "--policies",
        "tokenbutler",
        "--budgets",
        "1/2",
        *options,
    ]
    assert main(["eval", *(str(a) for a in arguments)]) == 0
    assert f"the report is in {run / 'eval'}" in capfd.readouterr().out
    assert {"report.md", "report.html", "cells.jsonl"} <= {path.name for path in (run / "eval").iterdir()}
    found = json.loads((run / "eval" / "report.json").read_text())["rows"]
    assert {"task", "metric", "policy", "budget", "value", "error", "n", "seed", "attended", "where"} <= set(found[0])
    assert {row["policy"] for row in found} == {"tokenbutler"} | (set() if options else {"tokenbutler:tolerance"})


def test_a_pipe_that_is_closed_ends_a_command_without_a_line():
    code = "from butler_jax.cli.command_line import run; raise SystemExit(run(lambda: print('x' * 10**6, flush=True)))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert not process.stderr.read() and process.wait() == 128 + signal.SIGPIPE


def test_a_backend_that_jax_does_not_have_is_named():
    code = "import jax; from butler_jax.cli.command_line import run; raise SystemExit(run(lambda: jax.devices() and 0))"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]  # JAX may have said more before
    assert done.returncode == 1 and last.startswith("error: ") and "JAX_PLATFORMS" in last
