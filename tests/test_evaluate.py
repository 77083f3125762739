"""Every task in one report, on the embedded model."""

from __future__ import annotations

import json

import pytest

from butler_jax import load_base
from butler_jax.configs import DOWNSTREAM, TASKS, EvalConfig
from butler_jax.evaluation import evaluate

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
