"""What tests of evaluation share: a configuration, a row of a report, and the files of downstream tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.report.report import ReportRow
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.weights import Base
from tests.tiny_models import BASE, Letters
from tests.tiny_runs import WORDS

LINES = {
    "lambada": [{"context": f"the old {word} sings over a", "continuation": "bird"} for word in WORDS],
    "piqa": [
        {"query": "Question: a river?\n", "choices": ["stone and hill", "quiet"], "gold": 1},
        {"query": "Question: light  \n", "choices": ["falls", "the bird sings"], "gold": 0},
    ],
    "winogrande": [
        {
            "context_options": ["the bird saw the hill so the bird", "the bird saw the hill so the hill"],
            "continuation": "sings.",
            "gold": 0,
        }
    ],
    "arc_easy": [{"query": "Question: what falls?", "choices": ["light", "a", "stone", "hill"], "gold": 2}],
}
FILES = {"lambada": "lambada_openai", "piqa": "piqa", "winogrande": "winogrande", "arc_easy": "arc_easy"}


def make_row(**given: Any) -> ReportRow:
    """A row of a report, complete but for what is given."""
    defaults = dict(task="perplexity", metric="perplexity", policy="oracle", budget=0.5, value=1.5, error=None, n=3)
    return ReportRow(**(defaults | dict(sequences=2, unit="windows", seed=0, attended=0.5, where={}) | given))


def write_samples(directory: Path) -> Path:
    """Write the files of all downstream tasks into a directory, and return it."""
    for task, lines in LINES.items():
        (directory / f"{FILES[task]}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def make_perplexity_evaluation(model: Any, directory: Path) -> tuple[Base, Any, EvalConfig]:
    """Base, predictor and configuration of an evaluation of perplexity on a short text in a directory."""
    (directory / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    config = EvalConfig(
        tasks="perplexity",
        text=directory / "text.txt",
        tokens=300,
        context=100,
        budgets="1/2,32",
        batch_size=3,
        policies="dense,streaming,tokenbutler",
        allocations="per_head",
        prompt_tokens=0,
    )
    return Base("letters", model, Letters(), "f"), predictor, config
