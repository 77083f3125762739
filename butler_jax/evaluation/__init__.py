"""Judging: perplexity, co-reference, recalled attention mass and hit rate under policies and budgets; analyses."""

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
from butler_jax.evaluation.coreference import coreference, coreference_batches
from butler_jax.evaluation.evaluate import evaluate, run_config
from butler_jax.evaluation.perplexity import perplexity, text_windows
from butler_jax.evaluation.reading import attention_and_scores, reading
from butler_jax.evaluation.recall import Recall, recall
from butler_jax.evaluation.report import Report
from butler_jax.evaluation.rows import text_batch
from butler_jax.evaluation.simulate import Simulated, simulate

__all__ = [
    "Recall",
    "Report",
    "Simulated",
    "attention_and_scores",
    "binned",
    "calibrate_thresholds",
    "coloured",
    "coloured_text",
    "coreference",
    "coreference_batches",
    "evaluate",
    "head_agreement",
    "hit_rate_and_drift",
    "overlap",
    "perplexity",
    "pictures",
    "reading",
    "recall",
    "run_config",
    "simulate",
    "step_agreement",
    "text_batch",
    "text_windows",
    "token_access",
]
