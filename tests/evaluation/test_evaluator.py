"""Every task in one report, on the embedded model."""

from __future__ import annotations

import dataclasses
import html
import json

import pytest

from butler_jax import distil, load_base
from butler_jax.evaluation import evaluate
from butler_jax.evaluation.config import DOWNSTREAM, TASKS, EvalConfig
from butler_jax.evaluation.report.facts import facts
from butler_jax.runs.saved_predictor import load_predictor, save_predictor
from tests import tiny_runs


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
        run=tmp_path / "run", compare=tmp_path / "saved", tasks="perplexity", policies="tokenbutler,lowrank", tokens=64,
        context=32, budgets="1/2", text=place["text"], data_dir=place["data_dir"],
    )  # fmt: skip
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
    assert ("training of tokenbutler", "not known: the predictor was given without its run") in facts(given.about)


LINES = {
    "lambada_openai.jsonl": {"context": "The file is opened, read and", "continuation": "closed"},
    "piqa.jsonl": {"query": "Question: read a file\n", "choices": ["open it first", "paint it blue"], "gold": 0},
    "winogrande.jsonl": {
        "context_options": ["The box fell on the cup so the box", "The box fell on the cup so the cup"],
        "continuation": "broke.", "gold": 1,
    },
    "arc_easy.jsonl": {"query": "Question: what is hot", "choices": ["ice", "fire", "snow"], "gold": 1},
}  # fmt: skip


@pytest.mark.slow
def test_every_task_comes_into_one_report_and_is_not_measured_twice(tmp_path):
    for name, line in LINES.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for _ in range(3)))
    (tmp_path / "text.txt").write_text(
        "The function returns the value of the key. It is an error to call it twice. " * 60
    )
    config = EvalConfig(
        tasks=TASKS, policies="dense,streaming,citrus", budgets="1/4", text=tmp_path / "text.txt", tokens=256,
        context=128, samples=3, needles=1, lengths="192,256", depths="0,1", limit=2, downstream=tmp_path,
    )  # fmt: skip
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
