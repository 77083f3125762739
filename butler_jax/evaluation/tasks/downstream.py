"""Downstream tasks under a policy and a budget, through lm-evaluation-harness: accuracy and perplexity with errors."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import NamedTuple

import numpy as np

from butler_jax.evaluation.tasks.local_tasks import local_tasks
from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Estimate, ratio, share
from butler_jax.weights import Base

METRICS = {"acc": "accuracy", "acc_norm": "accuracy_norm", "perplexity": "perplexity"}


class Downstream(NamedTuple):
    """(metric, estimate) of every metric of a task, samples being the independent unit, and the mean fraction read."""

    estimates: list[tuple[str, Estimate]]
    attended: float


def downstream(
    base: Base,
    policy: Policy,
    selection: SelectionConfig,
    predictor: Predictor | None = None,
    *,
    directory: str | Path,
    task: str,
    limit: int | None = None,
    batch_size: int = 8,
    score_dtype: str | None = None,
    progress: bool = False,
    passes: Passes | None = None,
) -> Downstream:
    """A task of `local_tasks` (lambada, piqa, winogrande, arc_easy) on its first `limit` samples, all by default.

    accuracy: share of the samples that are right; accuracy_norm: with likelihoods divided by the choice's characters;
    perplexity (lambada): exp of the mean negative log-likelihood of the last word. Every position attends its own
    choice. passes: what other budgets have run already. Raises as `local_tasks` does, and ImportError where
    lm-evaluation-harness is not installed.
    """
    check_harness()
    from lm_eval import evaluate

    from butler_jax.evaluation.tasks.harness import ButlerLM

    with _quiet(progress):
        model = ButlerLM(
            base, policy, selection, predictor, batch_size=batch_size, score_dtype=score_dtype, progress=progress,
            passes=passes,
        )  # fmt: skip
        found = evaluate(model, local_tasks(directory, [task]), limit=limit, bootstrap_iters=0, log_samples=True)
    samples = found["samples"][f"{task}_local"]
    return Downstream([(METRICS[name], _estimate(samples, name)) for name in samples[0]["metrics"]], model.attended)


def check_harness() -> None:
    """Raise ImportError where lm-evaluation-harness cannot be imported, saying what to install."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"downstream tasks need lm-evaluation-harness ({error}); pip install butler-jax[harness]"
        ) from None


def _estimate(samples: list[dict], name: str) -> Estimate:
    values = np.asarray([sample[name] for sample in samples], np.float64)
    if name == "perplexity":  # of a sample: its log-likelihood
        return ratio(-values, np.ones(len(values))).exp()
    return share(values, np.ones(len(values)))


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without the harness's notes on its own configuration, and without its bars unless progress is to be seen."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if progress else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
