"""`butler-jax generate`: its output, and its messages where it cannot continue a prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from butler_jax import generate, load_base
from butler_jax.cli import main
from butler_jax.cli.command_line import read
from butler_jax.cli.generate import GenerateConfig
from butler_jax.decoding.config import SamplingConfig
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.runs.saved_predictor import save_predictor
from butler_jax.selection.config import SelectionConfig
from butler_jax.storage.settings import to_dict
from butler_jax.weights.loading import TINY
from tests import tiny_runs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with an untrained predictor."""
    directory = tmp_path_factory.mktemp("generate")
    place = tiny_runs.make_place(directory)
    base = load_base(str(place["base"]))
    config = PredictorConfig(kind="lookahead", rank=4, stride=2)
    save_predictor(directory / "run", make_predictor(base.config, config), base)
    settings = to_dict(tiny_runs.settings(place, directory / "run"))
    (directory / "run" / "config.json").write_text(json.dumps(settings))
    return directory / "run"


def test_a_prompt_is_continued(run_dir, capfd):
    assert main(["generate", "--run", str(run_dir), "--prompt", "the river", "--max-new-tokens", "20"]) == 0
    out, error = capfd.readouterr()
    assert out.startswith("the river") and "tokens/s" in error and "% of the cache read" in error


def test_a_model_that_ends_at_once_and_a_rate_of_few_tokens(tmp_path, capfd):
    arguments = ["generate", "--base", "tiny", "--prompt", "def f(x):\n    return x\n\n\n", "--max-new-tokens", "3"]
    assert main(arguments) == 0
    few = capfd.readouterr().err
    assert "tokens/s" not in few and "ended the text at once" not in few
    first = generate(load_base("tiny"), arguments[4], max_new_tokens=1).tokens[0][0]
    shutil.copytree(TINY, tmp_path / "tiny")
    (tmp_path / "tiny" / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    arguments[2] = str(tmp_path / "tiny")
    assert main(arguments) == 0
    assert "chat_template in its tokenizer_config.json" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "give --run DIR"),
        (["--run", "RUN", "--prompt", "x", "--budget", "0"], "above 0"),
        (["--run", "RUN", "--prompt", "x", "--budget=-1/4"], "above 0"),
        (["--run", "RUN", "--prompt", "x", "--budget", "1.5"], "at most 1.0"),
        (["--run", "RUN", "--prompt", "x", "--budget", "9"], "below 4 sinks"),
        (["--run", "RUN", "--prompt", "x", "--budget", "half"], "is not a number"),
        (["--run", "RUN", "--prompt", "x", "--unit", "12"], "power of two"),
        (["--run", "RUN", "--prompt", "x", "--max-new-tokens", "500"], "context of 128 tokens"),
        (["--run", "absent", "--prompt", "x"], "absent"),
        (["--run", "RUN", "--prompt-file", "absent.txt"], "absent.txt"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run_dir, capfd, arguments, message):
    assert main(["generate", *(str(run_dir) if a == "RUN" else a for a in arguments)]) == 1
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error and len(lines) == 1 and message in lines[0], error


def test_flags_are_flat_and_their_settings_nest():
    flags = [
        "--base",
        "tiny",
        "--policy",
        "streaming",
        "--budget",
        "1/8",
        "--sinks",
        "2",
        "--recent",
        "16",
        "--unit",
        "4",
        "--interval",
        "2",
        "--neighbours",
        "--min-context",
        "64",
        "--temperature",
        "0.5",
        "--top-k",
        "3",
        "--top-p",
        "0.9",
        "--repetition-penalty",
        "1.1",
    ]
    config = read(GenerateConfig, flags, "butler-jax generate")
    assert config.selection == SelectionConfig(
        budget=1 / 8, sinks=2, recent=16, unit=4, interval=2, neighbours=True, min_context=64
    )
    assert config.sampling == SamplingConfig(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.1)
    for text, budget in (("256", 256), ("0.5", 0.5), ("1", 1.0)):
        arguments = ["--base", "tiny", "--budget", text, "--sinks", "0", "--recent", "1"]
        found = read(GenerateConfig, arguments, "butler-jax generate").selection.budget
        assert found == budget and type(found) is (int if text.isdigit() else float)


def test_any_policy_is_taken_and_the_known_ones_are_named():
    config = GenerateConfig(base="tiny", policy="streaming")
    assert config.make_policy() == make_policy("streaming") and not config.is_dense
    assert GenerateConfig(base="tiny").is_dense  # no run
    assert GenerateConfig(base="tiny", run=Path("x"), policy="dense").is_dense
    with pytest.raises(ValueError, match="unknown policy 'fortune'; known: dense, oracle"):
        GenerateConfig(base="tiny", policy="fortune")


def test_decoding_is_not_dense_where_tokenbutler_was_asked_for(capsys):
    assert main(["generate", "--base", "tiny", "--policy", "tokenbutler", "--budget", "1/8", "--prompt", "a"]) == 1
    told = capsys.readouterr()
    assert not told.out and told.err == (
        "error: the policy tokenbutler needs a trained predictor; give --run RUN (a run of butler-jax train; "
        "run=RUN in --model_args, predictor= in Python), or another policy\n"
    )
    assert GenerateConfig(base="tiny", run=Path("x")).make_policy() == make_policy("tokenbutler")
    assert GenerateConfig(base="tiny", policy="tokenbutler", dense=True).is_dense
