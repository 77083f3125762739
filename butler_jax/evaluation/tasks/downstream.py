"""Downstream tasks under a policy and a budget, through lm-evaluation-harness: accuracy and perplexity with errors."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import NamedTuple

import numpy as np

from butler_jax.evaluation.cells import Cell
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.hashes import hash_facts
from butler_jax.evaluation.tasks.base import Task
from butler_jax.evaluation.tasks.local_tasks import make_local_tasks, read_samples
from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Estimate, estimate_ratio, estimate_share
from butler_jax.weights import Base

METRICS = {"acc": "accuracy", "acc_norm": "accuracy_norm", "perplexity": "perplexity"}


class HarnessScores(NamedTuple):
    """The metrics of a task with errors over its samples, and mean shares of the keys that were read.

    attended: of the causal keys in the served layers. of_dense: in all layers, of those that a dense pass reads.
    """

    estimates: dict[str, Estimate]
    attended: float
    of_dense: float


def run_harness(
    base: Base,
    policy: Policy,
    selection: SelectionConfig,
    predictor: Predictor | None = None,
    *,
    directory: str | Path,
    task: str,
    limit: int | None = None,
    batch_size: int = 8,
    passes: Passes | None = None,
) -> HarnessScores:
    """Run a task of `make_local_tasks`; every position attends its own choice.

    Args:
        predictor: Needed by policies that rank by a predictor's scores.
        task: lambada, piqa, winogrande or arc_easy.
        limit: The first so many samples; None takes all.
        passes: Passes that other budgets have run already.

    Returns:
        Accuracy, the share of right samples; accuracy_norm, with likelihoods divided by the choice's characters;
        perplexity (lambada), exp of the mean negative log-likelihood of the last word.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError, FileNotFoundError: As `make_local_tasks` does.
    """
    check_harness()
    from lm_eval import evaluate

    from butler_jax.evaluation.tasks.harness import ButlerLM

    with _quieten():
        model = ButlerLM(base, policy, selection, predictor, batch_size=batch_size, passes=passes)
        tasks = make_local_tasks(directory, [task])
        found = evaluate(model, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = found["samples"][f"{task}_local"]
    estimates = {METRICS[n]: _estimate_metric(samples, n) for n in samples[0]["metrics"]}
    return HarnessScores(estimates, model.attended, model.of_dense)


def check_harness() -> None:
    """Raise ImportError, with what to install, where lm-evaluation-harness cannot be imported."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"downstream tasks need lm-evaluation-harness ({error}); pip install butler-jax[harness]"
        ) from None


class DownstreamTask(Task):
    """A task of lm-evaluation-harness on a local file."""

    def __init__(self, base: Base, config: EvalConfig, name: str):
        check_harness()
        samples = read_samples(config.downstream, name)[: config.limit]
        super().__init__(base, config, {"samples": hash_facts({"samples": samples})})
        self.name = name
        self.passes = Passes(base.model, prompted=config.prompt_tokens > 0, score_dtype=config.score_dtype)

    def expect(self, cells):
        """Read prompts once for policies with and without a predictor."""
        self.passes.expect(policy.predictor for policy, _ in cells)

    def evaluate(self, policy, selections):
        """Measure one budget."""
        ((budget, selection),) = selections.items()
        found = run_harness(
            self.base,
            policy.policy,
            selection,
            policy.predictor,
            directory=self.config.downstream,
            task=self.name,
            limit=self.config.limit,
            batch_size=self.config.batch_size,
            passes=self.passes,
        )
        rows = [
            self.make_row(policy, name, estimate, budget=budget, attended=found.attended, of_dense=found.of_dense)
            for name, estimate in found.estimates.items()
        ]
        return Cell(rows)


def _estimate_metric(samples: list[dict], name: str) -> Estimate:
    values = np.asarray([sample[name] for sample in samples], np.float64)
    if name == "perplexity":  # of a sample: its log-likelihood
        return estimate_ratio(-values, np.ones(len(values))).exp()
    return estimate_share(values, np.ones(len(values)))


@contextmanager
def _quieten() -> Iterator[None]:
    """Hide the harness's notes on its own configuration, and its bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
