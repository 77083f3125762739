"""`butler-jax generate`: its output, and its messages where it cannot continue a prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from butler_jax import chat, generate, load_base
from butler_jax.cli import main
from butler_jax.cli.command_line import options_of, read
from butler_jax.cli.generate import GenerateConfig, choose_sampling, show_figures
from butler_jax.decoding import Generated
from butler_jax.decoding.config import SamplingConfig
from butler_jax.model import BaseConfig
from butler_jax.policies import POLICIES, make_policy
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


def test_dense_reads_everything_in_spite_of_a_run(run_dir, capfd):
    arguments = ["generate", "--run", str(run_dir), "--prompt", "the river", "--max-new-tokens", "4"]
    assert main([*arguments, "--dense"]) == 0
    assert "100.0 % of the cache read" in capfd.readouterr().err


def test_both_shares_are_printed_where_layers_slide_beside_served_ones(capsys):
    result = Generated(tokens=[[1, 2]], attended=[0.25], attended_of_dense=[0.6], prompt_tokens=[9])
    sizes = dict(vocab_size=9, width=16, hidden=16, layers=4, heads=2, kv_heads=1, head_dim=8, context=32)
    for slides, end in (
        (
            (True, False) * 2,
            "25.0 % of the cache read in the 2 served layers, 60.0 % of what dense decoding reads in all 4",
        ),
        ((True,) * 4, "25.0 % of the cache read, 60.0 % of what dense decoding reads"),
        ((False,) * 4, "25.0 % of the cache read"),
    ):
        config = BaseConfig(family="mistral", sliding_window=8, sliding_layers=slides, **sizes)
        show_figures(SimpleNamespace(config=config), result)
        assert capsys.readouterr().err.endswith(end + "\n")


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
    assert "has no chat_template that says it" in capfd.readouterr().err
    (tmp_path / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    assert main(arguments) == 0
    assert "give --chat, which" in capfd.readouterr().err


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def talking(tmp_path) -> Path:
    """tiny, with a chat template."""
    shutil.copytree(TINY, tmp_path / "talking")
    (tmp_path / "talking" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "talking"


def test_a_message_is_answered_in_the_models_template(talking, capfd):
    base = load_base(talking)
    prompt = "system: Be kind.\nuser: The file\nassistant:"
    wanted = generate(base, base.tokenizer.encode(prompt), max_new_tokens=6)
    told = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "The file"}]
    assert chat(base, told, max_new_tokens=6).tokens == wanted.tokens
    arguments = ["--chat", "--system", "Be kind.", "--prompt", "The file", "--max-new-tokens", "6"]
    assert main(["generate", "--base", str(talking), *arguments]) == 0
    out, error = capfd.readouterr()
    assert out == wanted.text + "\n" and "cut after 6 tokens" in error
    assert main(["generate", "--base", "tiny", "--chat", "--prompt", "x"]) == 1
    assert "error: the model has no chat template" in capfd.readouterr().err
    assert main(["generate", "--base", "tiny", "--system", "x", "--prompt", "x"]) == 1
    assert "give --chat too" in capfd.readouterr().err


def test_a_policy_is_prepared_on_the_text_of_the_run(run_dir, tmp_path, capfd):
    place = tmp_path / "prepared"
    how = ["--prompt", "The file", "--max-new-tokens", "2", "--policy", "lowrank:rank=4", "--data-dir", str(place)]
    assert main(["generate", "--run", str(run_dir), *how]) == 0
    assert capfd.readouterr().out.startswith("The file") and list(place.rglob("*.array_record*"))


def test_a_template_is_chosen_by_its_name(talking, capfd):
    base = ["generate", "--base", str(talking), "--prompt", "The file", "--max-new-tokens", "6"]
    (talking / "additional_chat_templates").mkdir()
    (talking / "additional_chat_templates" / "terse.jinja").write_text("{{ messages[0].content }}")
    assert main([*base, "--chat", "--template", "terse"]) == 0
    wanted = generate(load_base(talking), "The file", max_new_tokens=6).text
    assert capfd.readouterr().out == wanted + "\n"
    assert main([*base, "--chat", "--template", "rag"]) == 1
    assert "no chat template 'rag'; there are: default, terse" in capfd.readouterr().err
    assert main([*base, "--template", "terse"]) == 1
    assert "--template names a chat template; give --chat too" in capfd.readouterr().err


def test_a_conversation_at_a_terminal_keeps_its_turns(talking, capfd, monkeypatch):
    typed = iter(["The file", "", "long " * 3000, "Return the"])  # the third is beyond the context of 2,048 tokens
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))

    def ended():
        raise EOFError

    monkeypatch.setattr("builtins.input", lambda _: ended() if (text := next(typed, None)) is None else text)
    base, messages, wanted = load_base(talking), [], ""
    for question in ("The file", "Return the"):
        messages.append({"role": "user", "content": question})
        answer = chat(base, messages, max_new_tokens=6).text
        messages.append({"role": "assistant", "content": answer})
        wanted += answer + "\n"
    assert main(["generate", "--base", str(talking), "--chat", "--max-new-tokens", "6"]) == 0
    out, error = capfd.readouterr()
    assert out == wanted + "\n" and "of them kept) + 6 tokens" in error
    assert "context of 2048 tokens" in error and "; the message was left out" in error


@pytest.mark.slow
def test_sampling_that_is_not_given_is_that_of_generation_config(talking, capfd):
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 5, "min_p": 0.1}
    (talking / "generation_config.json").write_text(json.dumps(drawn))
    base = load_base(talking)
    model, hot = SamplingConfig(temperature=0.7, top_k=5), SamplingConfig(temperature=2.0, top_k=5)
    assert generate(base, "The file", max_new_tokens=2).sampling == model
    source = "generation_config.json (in a .gguf file: general.sampling): "
    for arguments, sampling, said in (
        ([], model, source + "temperature 0.7, top_k 5; min_p of it passed over"),
        (["--temperature=2"], hot, source + "top_k 5; min_p"),
        (["--temperature", "0"], SamplingConfig(top_k=5), source + "min_p of it passed"),
        (["--prompt", "temperature"], model, source + "temperature 0.7, top_k 5; min_p of it passed over"),
    ):
        given = options_of(arguments)
        assert choose_sampling(read(GenerateConfig, ["--base", "x", *arguments], "generate"), given, drawn) == sampling
        assert said in capfd.readouterr().err
    assert main(["generate", "--base", str(talking), "--prompt", "The file", "--max-new-tokens", "8"]) == 0
    wanted = generate(base, "The file", max_new_tokens=8, sampling=model).text
    assert capfd.readouterr().out == f"The file{wanted}\n"


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
        (["--run", "absent", "--prompt", "x"], "no such directory: absent"),
        (["--run", "RUN", "--prompt", "x", "--dense", "--policy", "quest"], "--dense reads everything, and --policy"),
        (["--run", "RUN", "--prompt", "x", "--dense", "--budget", "1/8"], "the policy is dense, and --budget needs a"),
        (["--base", "tiny", "--prompt", "x", "--sinks", "2", "--pooling", "maximum"], "--pooling, --sinks needs a"),
        (["--run", "RUN", "--prompt", "x", "--policy", "quest", "--score-dtype", "int8"], "needs a predictor, which"),
        (["--run", "RUN", "--prompt", "x", "--stop", "a", "--stop", "b"], "--stop is given twice, and only the last"),
        (["--run", "RUN", "--prompt-file", "absent.txt"], "absent.txt"),
        (["--base", "tiny", "--prompt", "x", "--top-p", "0.5", "--seed", "1"], "--seed, --top-p needs draws, and the"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run_dir, capfd, arguments, message):
    assert main(["generate", *(str(run_dir) if a == "RUN" else a for a in arguments)]) == 1
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error and len(lines) == 1 and message in lines[0], error


def test_settings_are_refused_before_the_prompt_is_shown(capfd):
    for wrong in (
        ["--max-new-tokens", "0"],
        ["--policy", "h2o", "--interval", "4"],
        ["--policy", "quest", "--tail", "8"],
    ):
        assert main(["generate", "--base", "tiny", "--prompt", "x", *wrong]) == 1
        assert capfd.readouterr().out == ""


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
    assert config.make_policy() == make_policy("streaming")
    for name in set(POLICIES) - {"tokenbutler"}:
        assert str(GenerateConfig(base="tiny", policy=name).make_policy()) == str(make_policy(name))
    butler = GenerateConfig(run=Path("x"), pooling="maximum").make_policy()
    assert butler == make_policy("tokenbutler", pooling="maximum")
    for dense in ({}, dict(run=Path("x"), policy="dense"), dict(run=Path("x"), dense=True)):
        assert GenerateConfig(base="tiny", **dense).make_policy() == make_policy("dense")
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
