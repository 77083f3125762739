"""Judging: tasks under policies and budgets, each number with its standard error; analyses and their pictures."""

from __future__ import annotations

from butler_jax.evaluation import pictures
from butler_jax.evaluation.analysis import (
    binned,
    head_agreement,
    hit_rate_and_drift,
    overlap,
    step_agreement,
    token_access,
)
from butler_jax.evaluation.calibration import calibrate_thresholds
from butler_jax.evaluation.coloured import coloured, coloured_text
from butler_jax.evaluation.coreference import coreference_batches
from butler_jax.evaluation.evaluate import evaluate, run_config
from butler_jax.evaluation.perplexity import TextResult, perplexity, text_windows
from butler_jax.evaluation.reading import attention_and_scores, reading
from butler_jax.evaluation.recall import Recall, recall
from butler_jax.evaluation.report import Report
from butler_jax.evaluation.retrieval import key_value_batches, needle_batches, variables_batches
from butler_jax.evaluation.rows import text_batch
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
    "attention_and_scores",
    "binned",
    "calibrate_thresholds",
    "coloured",
    "coloured_text",
    "coreference_batches",
    "evaluate",
    "head_agreement",
    "hit_rate_and_drift",
    "key_value_batches",
    "needle_batches",
    "overlap",
    "perplexity",
    "pictures",
    "ratio",
    "reading",
    "recall",
    "run_config",
    "simulate",
    "step_agreement",
    "text_batch",
    "text_windows",
    "token_access",
    "variables_batches",
]
