"""Every task in one report, on the embedded model."""

from __future__ import annotations

import dataclasses
import html
import json
import sys
import types
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax import distil, load_base
from butler_jax.data.windows import cut_text, read_text
from butler_jax.evaluation import Report, evaluate, measure_perplexity
from butler_jax.evaluation.config import DOWNSTREAM, TASKS, EvalConfig
from butler_jax.evaluation.report.facts import list_facts
from butler_jax.evaluation.report.pages import render_markdown, render_page
from butler_jax.evaluation.report.summary import ERRORS
from butler_jax.evaluation.report.tables import make_tables
from butler_jax.policies import POLICIES, Scoring, make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.runs import provenance
from butler_jax.runs.saved_predictor import load_predictor, save_predictor
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import simulate
from butler_jax.weights import Base
from tests import tiny_runs
from tests.tiny_evaluations import make_perplexity_evaluation
from tests.tiny_models import BASE, Letters, make_batch, make_model


@pytest.mark.slow
def test_a_report_tells_how_its_predictors_were_trained(tmp_path):
    place = tiny_runs.make_place(tmp_path)
    base = load_base(str(place["base"]))
    settings = tiny_runs.settings(place, tmp_path / "run", steps=4, checkpoint_every=2)
    distil(base, settings)
    losses = {r["step"]: r["validation_loss"] for r in tiny_runs.rows(tmp_path / "run") if "validation_loss" in r}
    command = json.loads((tmp_path / "run" / "run.json").read_text())[-1]["command"]
    predictor = load_predictor(tmp_path / "run", base)
    save_predictor(tmp_path / "saved", predictor, base)
    config = EvalConfig(
        run=tmp_path / "run",
        compare=tmp_path / "saved",
        tasks="perplexity",
        policies="tokenbutler,lowrank",
        allocations="per_head",
        tokens=64,
        context=32,
        budgets="1/2",
        text=place["text"],
        data_dir=place["data_dir"],
    )
    report = evaluate(base, config=config)
    told = report.about["predictors"]["tokenbutler"]["training"]
    assert told["step"] == min(losses, key=losses.get) and told["run"] == str(tmp_path / "run")
    wanted = {"steps": 4, "length": 32, "batch_size": 2, "tokens_a_step": 64, "data": settings.data}
    assert {name: told[name] for name in wanted} == wanted
    assert told["command"] == command and told["learning_rate"] == 5e-3  # lookahead's own
    (other,) = (c["training"] for n, c in report.about["predictors"].items() if n != "tokenbutler")
    assert set(other) <= {"run", "step"} and other["run"] == str(tmp_path / "saved")
    lowrank = next(p for p in report.about["policies"] if p["name"] == "lowrank")
    assert lowrank["found_on"] == f"about 8,192 tokens of the training part of {settings.data}"
    path = report.save(tmp_path / "out").parent
    for text in ((path / "report.md").read_text().replace("\\", ""), html.unescape((path / "report.html").read_text())):
        assert f"step {told['step']} of 4, 64 tokens a step (2 x 32), on {settings.data}, learning rate 0.005" in text
        assert command in text and lowrank["found_on"] in text
    given = evaluate(base, predictor, dataclasses.replace(config, run=None, compare=(), policies=("tokenbutler",)))
    assert given.about["predictors"]["tokenbutler"]["training"] == {}
    assert ("training of tokenbutler", "not known: the predictor was given without its run") in list_facts(given.about)


LINES = {
    "lambada_openai.jsonl": {"context": "The file is opened, read and", "continuation": "closed"},
    "piqa.jsonl": {"query": "Question: read a file\n", "choices": ["open it first", "paint it blue"], "gold": 0},
    "winogrande.jsonl": {
        "context_options": ["The box fell on the cup so the box", "The box fell on the cup so the cup"],
        "continuation": "broke.",
        "gold": 1,
    },
    "arc_easy.jsonl": {"query": "Question: what is hot", "choices": ["ice", "fire", "snow"], "gold": 1},
}


@pytest.mark.slow
def test_every_task_comes_into_one_report_and_is_not_measured_twice(tmp_path):
    for name, line in LINES.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for _ in range(3)))
    (tmp_path / "text.txt").write_text(
        "The function returns the value of the key. It is an error to call it twice. " * 60
    )
    config = EvalConfig(
        tasks=TASKS,
        policies="dense,streaming,citrus",
        budgets="1/4",
        text=tmp_path / "text.txt",
        tokens=256,
        context=128,
        samples=3,
        needles=1,
        lengths="192,256",
        depths="0,1",
        limit=2,
        downstream=tmp_path,
    )
    base, said = load_base("tiny"), []
    report = evaluate(base, config=config, keep=tmp_path / "out", say=said.append)
    for task in TASKS:
        found = {(r["policy"], r["budget"]) for r in report.rows if r["task"] == task and r["budget"] is not None}
        dense = set() if task == "attention" else {("dense", 1)}
        assert found == dense | {("streaming", 0.25), ("citrus", 0.25)}, task
    assert all(r["n"] == 2 for r in report.rows if r["task"] in DOWNSTREAM)
    places = [r["where"] for r in report.rows if (r["task"], r["policy"]) == ("needle", "dense")]
    assert places == [{}, *({"depth": d, "length": n} for n in (192, 256) for d in (0.0, 1.0))]
    labels = [r["where"].get("distance") for r in report.rows if r["task"] == "coreference" and r["policy"] == "dense"]
    assert labels.count(None) == 2 and len(labels) > 2
    said.clear()
    again = evaluate(base, config=config, keep=tmp_path / "out", say=said.append)
    assert again.rows == report.rows and all("kept" in line for line in said)
    page = (report.save(tmp_path / "out").parent / "report.html").read_text()
    assert all(task.replace("_", " ") in page.lower() or task in page for task in TASKS)


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_evaluation_yields_every_row_and_writes_report(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    base = Base("letters", model, Letters(), "f")
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    config = EvalConfig(
        tasks="perplexity,attention",
        text=text,
        tokens=1000,
        context=128,
        budgets="1/2,32",
        batch_size=3,
        policies="dense,random,tokenbutler",
        allocations="per_head",
    )
    lines = []
    report = evaluate(base, predictor, config, say=lines.append)
    assert any("360 tokens, fewer than the 1,000" in line for line in lines)
    alone = ("perplexity", "effective_sparsity", "bytes_read")
    compared = ("bytes_of_dense", "over_dense", "js_divergence", "top1_agreement", "recalled_mass")
    wanted = {(metric, "dense", 1) for metric in alone}
    for policy in ("random", "tokenbutler"):
        wanted |= {(metric, policy, b) for metric in (*alone, *compared) for b in (0.5, 32)}
        wanted |= {(metric, policy, None) for metric in ("hit_rate", "spearman")}
    assert {(r["metric"], r["policy"], r["budget"]) for r in report.rows} == wanted
    assert all(r["n"] > 0 and r["error"] > 0 for r in report.rows if r["policy"] == "random")
    nothing_chosen = {r["metric"] for r in report.rows if r["attended"] is None}
    assert nothing_chosen == {"hit_rate", "spearman"}
    saved = json.loads(report.save(tmp_path / "out").read_text())
    assert saved["rows"] == report.rows and saved["predictors"]["tokenbutler"]["kind"] == "lookahead"
    assert np.shape(saved["arrays"]["hit_rate"]["tokenbutler"]) == (BASE.layers - 1, BASE.heads)
    assert report.value("perplexity", "dense") == saved["rows"][0]["value"]
    assert report.value("perplexity", "random", "1/2") == report.value("perplexity", "random", 0.5)
    with pytest.raises(KeyError, match=r"no row has task 'perplexity' \(there: perplexity, .*budget 0.1 \(there: "):
        report.value("perplexity", "random", 0.1)
    shown = report._repr_markdown_()
    assert "| **tokenbutler** |" in shown and repr(report).startswith("Report('letters': ")
    report.print()
    assert "tokenbutler" in capsys.readouterr().out


def test_bad_input_is_a_clear_error(model, tmp_path):
    base = Base("letters", model, Letters(), "f")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match="is empty"):
        evaluate(base, config=EvalConfig(tasks="perplexity", policies="dense", text=empty, context=64))
    with pytest.raises(FileNotFoundError, match="no such text file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="beyond the model's context of 512"):
        evaluate(base, config=EvalConfig(tasks="perplexity", context=1024))
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        evaluate(base, config=EvalConfig(policies="best"))
    with pytest.raises(ValueError, match="unknown task chess"):
        EvalConfig(tasks="chess")
    with pytest.raises(ValueError, match="budget 'half' is not a number"):
        EvalConfig(budgets="half")
    with pytest.raises(ValueError, match="at most 1"):
        EvalConfig(budgets="3/2")
    with pytest.raises(ValueError, match="the policy tokenbutler needs a trained predictor; give --run RUN"):
        evaluate(base, config=EvalConfig(policies="dense,tokenbutler", context=64))
    with pytest.raises(ValueError, match="--compare is about predictors, and no policy of --policies needs one"):
        evaluate(base, config=EvalConfig(policies="dense", compare=tmp_path, context=64))
    with pytest.raises(ValueError, match="--policies names nothing"):
        EvalConfig(policies="")
    with pytest.raises(ValueError, match="needs a trained predictor"):
        simulate(model, make_batch([[8]], 8), make_policy("tokenbutler"), SelectionConfig(budget=0.5))
    with pytest.raises(KeyError, match="no row"):
        Report().value("perplexity", "dense")


@dataclass(frozen=True, kw_only=True)
class Norm(Scoring):
    """Keys of small (sign = -1) or large (sign = 1) norm are read first."""

    name = "norm"
    sign: int = 1

    def scores(self, chunk):
        norms = self.sign * jnp.linalg.norm(chunk.k.astype(jnp.float32), axis=-1)[:, :, None, None]
        return jnp.broadcast_to(norms, (*norms.shape[:3], chunk.q.shape[3], norms.shape[-1]))


@pytest.mark.slow
def test_policies_of_ones_own_are_evaluated_beside_those_with_names(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    base = Base("letters", model, Letters(), "f")
    settings = dict(text=text, tokens=128, context=128, budgets="1/2", prompt_tokens=0)
    own = [Norm(), Norm(sign=-1)]
    found = EvalConfig(tasks="perplexity", policies=("dense,oracle", *own), **settings)
    report = evaluate(base, config=found, keep=tmp_path / "out")
    labels = ["dense", "oracle", "norm:sign=1", "norm:sign=-1"]
    assert [*dict.fromkeys(r["policy"] for r in report.rows)] == labels
    (batch,) = cut_text(base.tokenizer, text.read_text(), context=128, tokens=128, batch_size=1)
    for policy, label in zip(own, labels[2:], strict=True):
        wanted = measure_perplexity(model, [batch], policy, SelectionConfig(budget=0.5)).perplexity.value
        assert report.value("perplexity", label, 0.5) == pytest.approx(wanted, rel=1e-5)
    about = json.loads(json.dumps(report.about))
    assert about["config"]["policies"] == ["dense", "oracle", "norm", "norm"]
    assert about["policies"][2:] == [{"name": "norm", "sign": 1}, {"name": "norm", "sign": -1}]
    alone = evaluate(base, config=EvalConfig(tasks="attention", policies=Norm(), **settings))
    assert {r["policy"] for r in alone.rows} == {"norm"}
    for policies, message in (
        (("oracle", make_policy("oracle")), "two policies are called oracle; give them names of their own"),
        ((Norm,), "is neither a policy nor a name of one; make it one"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(base, config=EvalConfig(tasks="perplexity", policies=policies, **settings))


@pytest.mark.slow
def test_without_a_predictor_the_default_policies_do_without_tokenbutler(model, tmp_path):
    text, said = tmp_path / "text.txt", []
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2)
    config = EvalConfig(tasks="perplexity", text=text, tokens=64, context=64, budgets="1/2")
    report = evaluate(Base("letters", model, Letters(), "f"), config=config, say=said.append)
    assert said[0] == "tokenbutler is left out: there is no trained predictor (give a run)"
    names = ["dense", "oracle", "streaming"]
    assert [*dict.fromkeys(r["policy"] for r in report.rows)] == report.about["config"]["policies"] == names


def test_a_base_without_tokenizer_is_told(model):
    base = Base("mute", model, None, "f")
    with pytest.raises(ValueError, match="the base mute has no tokenizer: its directory lacks"):
        evaluate(base, None, EvalConfig(policies=("streaming",), tasks=("perplexity",)))


@pytest.fixture
def place(model, tmp_path):
    return make_perplexity_evaluation(model, tmp_path)


def were_kept(said: list[str]) -> list[bool]:
    """Whether each cell that an evaluation has spoken of was kept from an earlier one."""
    return ["kept" in line for line in said if line.startswith("[")]


def test_finished_cells_are_not_measured_again(place, tmp_path):
    base, predictor, config = place
    first = evaluate(base, predictor, config, keep=tmp_path / "out")
    file = tmp_path / "out" / "cells.jsonl"
    lines = file.read_text().splitlines()
    assert [json.loads(line)["rows"][0]["policy"] for line in lines] == ["dense"] + ["streaming"] * 2 + [
        "tokenbutler"
    ] * 2
    # The last cell was cut off while it was written, and one is lost.
    file.write_text("\n".join(lines[:2] + lines[3:4] + [lines[4][:80]]))
    said = []
    again = evaluate(base, predictor, config, keep=tmp_path / "out", say=said.append)
    assert again.rows == first.rows
    assert [line for line in said if "compiling" in line] == [
        "compiling perplexity under streaming",
        "compiling perplexity under tokenbutler",
    ]
    assert were_kept(said) == [True, True, False, True, False]
    assert (first.about["cells"], again.about["cells"]) == ({"measured": 5, "kept": 0}, {"measured": 2, "kept": 3})
    took = {json.loads(line)["key"]: json.loads(line)["seconds"] for line in lines[:2] + lines[3:4]}
    took |= {json.loads(line)["key"]: json.loads(line)["seconds"] for line in file.read_text().splitlines()[-2:]}
    assert again.about["seconds"] == pytest.approx(sum(took.values()), abs=0.051) and len(took) == 5
    assert f"{again.about['seconds']:,.0f} s for 5 cells, 3 of them kept from earlier evaluations" in render_page(again)
    assert "left" in said[0] and "left" not in said[-1]
    other = make_predictor(BASE, PredictorConfig(rank=8, stride=2), seed=5)
    said.clear()
    evaluate(base, other, config, keep=tmp_path / "out", say=said.append)
    assert were_kept(said) == [True, True, True, False, False]  # another predictor, other cells


@pytest.mark.slow
@pytest.mark.parametrize("stride", [None, 60])
def test_a_report_says_over_how_many_windows_errors_are_and_whether_these_overlap(place, stride):
    base, predictor, config = place
    config = dataclasses.replace(config, stride=stride, tasks="perplexity,attention")
    report = evaluate(base, predictor, config)
    windows = 3 if stride is None else 5  # of 100 tokens, over 300
    assert {(r["sequences"], r["unit"]) for r in report.rows} == {
        (windows, "windows" if stride is None else "overlapping windows")
    }
    said = "± standard error over 3 windows"
    said = (
        said
        if stride is None
        else "± standard error over 5 overlapping windows, which are not independent, so it is too small"
    )
    text, whole = render_markdown(report), render_page(report)
    assert text.count(said) == whole.count(said) == len(make_tables(report.rows))
    assert ERRORS in whole and ERRORS in text


NEWEST = """
from dataclasses import dataclass
import jax.numpy as jnp
from butler_jax.policies import Scoring

@dataclass(frozen=True, kw_only=True)
class Newest(Scoring):
    name = "newest"

    def scores(self, chunk):
        like = jnp.zeros_like(chunk.logits)
        return like + SIGN * chunk.columns.astype(jnp.float32)[None, None, None, None]
"""


@pytest.mark.parametrize("in_a_file", [True, False])
def test_a_policy_that_was_edited_is_measured_anew(place, tmp_path, monkeypatch, in_a_file):
    base, _, config = place
    config = dataclasses.replace(config, policies=("dense", "newest"), budgets=(0.5,))

    def evaluated(text):
        module = types.ModuleType("newest_of_a_test")  # as importing the file does it, or a notebook's cell
        (tmp_path / "newest_tokens.py").write_text(text)
        if in_a_file:
            module.__file__ = str(tmp_path / "newest_tokens.py")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(text, "newest_tokens.py", "exec"), vars(module))
        monkeypatch.setitem(POLICIES, "newest", module.Newest)
        said = []
        report = evaluate(base, None, config, keep=tmp_path / "out", say=said.append)
        return were_kept(said), report.value("perplexity", "newest", 0.5)

    kept, newest = evaluated(NEWEST.replace("SIGN", "1.0"))
    assert kept == [False, False]
    assert evaluated(NEWEST.replace("SIGN", "1.0")) == ([True, True], newest)
    kept, oldest = evaluated(NEWEST.replace("SIGN", "-1.0"))
    assert kept == [True, False] and oldest != newest


def test_another_version_of_the_package_measures_anew(place, tmp_path, monkeypatch):
    base, predictor, config = place
    evaluate(base, predictor, config, keep=tmp_path / "out")
    known = {**provenance.versions(), "butler-jax": "9.9"}
    monkeypatch.setattr("butler_jax.evaluation.evaluator.versions", lambda: known)
    said = []
    evaluate(base, predictor, config, keep=tmp_path / "out", say=said.append)
    assert not any("kept" in line for line in said)


@pytest.mark.slow
def test_a_haystack_that_is_repeated_is_told_and_noted(place):
    base, _, config = place
    config = dataclasses.replace(
        config, tasks="needle", policies="dense", lengths=(300, 400, 500), depths=(0.5,), needles=1
    )
    said = []
    report = evaluate(base, None, config, say=said.append)
    told = f"{config.text} has 360 tokens: for needles of 400, 500 tokens it is repeated; give a longer text"
    assert told in said and report.about["notes"] == [told] and told in html.unescape(render_page(report))
    assert evaluate(base, None, dataclasses.replace(config, lengths=(300,))).about["notes"] == []


def test_a_directory_that_is_a_file_is_told(place, tmp_path):
    base, predictor, config = place
    for path in (tmp_path / "text.txt", tmp_path / "text.txt" / "deeper"):
        with pytest.raises(ValueError, match=r"text\.txt is a file, and the report needs a directory; give another"):
            evaluate(base, predictor, config, keep=path)
