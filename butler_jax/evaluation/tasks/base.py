"""The base class of tasks. A task is built once, and measures one policy after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from butler_jax.evaluation.cells import Cell
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.contenders import EvaluatedPolicy
from butler_jax.evaluation.report.report import ReportRow
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Estimate
from butler_jax.weights import Base


class Task:
    """Base class of tasks.

    Attributes:
        name: What the command line and reports call the task.
        unit: What standard errors are taken over.
        at_once: Whether one cell holds all budgets of a policy.
        facts: What results depend on besides base, policy and selection, JSON-ready.
    """

    name: str
    unit: str = "samples"
    at_once: ClassVar[bool] = False

    def __init__(self, base: Base, config: EvalConfig, facts: dict[str, Any]):
        self.base, self.config = base, config
        self.facts = {**facts, "score_dtype": config.score_dtype, "prompt_tokens": config.prompt_tokens}

    def takes(self, policy: EvaluatedPolicy) -> bool:
        """Whether the task measures a policy; by default every one."""
        return True

    def expect(self, cells: Sequence[tuple[EvaluatedPolicy, dict[float | int, SelectionConfig]]]) -> None:
        """Learn what will be evaluated, so that policies can share a pass; by default they do not."""

    def evaluate(self, policy: EvaluatedPolicy, selections: dict[float | int, SelectionConfig]) -> Cell:
        """Measure a policy under selections by budget: one of them, or all where `at_once`."""
        raise TypeError(f"{type(self).__name__} must define evaluate")

    def make_row(
        self,
        policy: EvaluatedPolicy,
        metric: str,
        estimate: Estimate,
        *,
        budget: float | int | None,
        attended: float | None,
        of_dense: float | None = None,
        where: dict[str, Any] | None = None,
    ) -> ReportRow:
        """An estimate as a row of the report; see `ReportRow` for budget, attended, attended_of_dense and where."""
        return ReportRow(
            task=self.name,
            metric=metric,
            policy=policy.label,
            budget=budget,
            **estimate._asdict(),
            unit=self.unit,
            seed=self.config.seed,
            attended=attended,
            attended_of_dense=of_dense if self.base.config.mixed else None,
            where=where or {},
            allocation=policy.allocation,
            prompt_tokens=self.config.prompt_tokens,
            tail=policy.tail,
        )
