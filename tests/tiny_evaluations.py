"""What tests of evaluation share: a row of a report, and the lines of the files of downstream tasks."""

from __future__ import annotations

from typing import Any

from butler_jax.evaluation.report.report import ReportRow
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
