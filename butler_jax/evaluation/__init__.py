"""Judging: tasks under policies and budgets, each number with its standard error."""

from __future__ import annotations

from butler_jax.evaluation.calibration import calibrate_thresholds
from butler_jax.evaluation.coreference import coreference_batches
from butler_jax.evaluation.evaluate import evaluate, run_config
from butler_jax.evaluation.perplexity import TextResult, perplexity, text_windows
from butler_jax.evaluation.recall import Recall, recall
from butler_jax.evaluation.report import Report
from butler_jax.evaluation.simulate import Simulated, simulate
from butler_jax.evaluation.statistics import Estimate, ratio
from butler_jax.evaluation.teacher_forced import Answers, answers

__all__ = [
    "Answers",
    "Estimate",
    "Recall",
    "Report",
    "Simulated",
    "TextResult",
    "answers",
    "calibrate_thresholds",
    "coreference_batches",
    "evaluate",
    "perplexity",
    "ratio",
    "recall",
    "run_config",
    "simulate",
    "text_windows",
]
