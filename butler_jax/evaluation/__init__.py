"""Judging: perplexity, co-reference, recalled attention mass and hit rate under policies and budgets."""

from __future__ import annotations

from butler_jax.evaluation.calibration import calibrate_thresholds
from butler_jax.evaluation.coreference import coreference, coreference_batches
from butler_jax.evaluation.evaluate import evaluate, run_config
from butler_jax.evaluation.perplexity import perplexity, text_windows
from butler_jax.evaluation.recall import Recall, recall
from butler_jax.evaluation.report import Report
from butler_jax.evaluation.simulate import Simulated, simulate

__all__ = [
    "Recall",
    "Report",
    "Simulated",
    "calibrate_thresholds",
    "coreference",
    "coreference_batches",
    "evaluate",
    "perplexity",
    "recall",
    "run_config",
    "simulate",
    "text_windows",
]
