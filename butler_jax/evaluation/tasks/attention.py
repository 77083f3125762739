"""How much of the true attention the chosen keys hold."""

from __future__ import annotations

from collections.abc import Sequence

from butler_jax.data import Batch
from butler_jax.evaluation.cells import Cell
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.contenders import EvaluatedPolicy
from butler_jax.evaluation.tasks.base import Task
from butler_jax.evaluation.tasks.perplexity import list_known
from butler_jax.evaluation.tasks.texts import name_windows
from butler_jax.parallel import hash_arrays
from butler_jax.selection import LIMITED, SelectionConfig
from butler_jax.simulation import Recall, measure_recall
from butler_jax.weights import Base

TIED = 0.01  # a share of ties that is worth a line of the report


class AttentionTask(Task):
    """Recalled attention mass, hit rate and rank correlation on the windows of perplexity."""

    name = "attention"
    at_once = True

    def __init__(self, base: Base, config: EvalConfig, batches: Sequence[Batch]):
        super().__init__(base, config, {"batches": hash_arrays(batches), "rows": config.attention_rows})
        self.batches, self.unit = batches, name_windows(config)
        self.expected: list[tuple[EvaluatedPolicy, dict[float | int, SelectionConfig]]] = []
        self.found: dict[str, Recall] = {}  # by label, measured together with that of another policy

    def takes(self, policy):
        """Every policy that does not read everything, without a tail, which changes no choice on dense streams.

        Under a tolerance and top-p, budgets are not tables of tokens.
        """
        return not policy.dense and not policy.tail and policy.allocation not in LIMITED

    def expect(self, cells):
        """Policies that can are measured in one dense pass, at the cell of the first one."""
        self.expected = list(cells)

    def evaluate(self, policy, selections):
        """Measure all budgets."""
        if policy.label not in self.found:
            together = self._together(policy, selections)
            found = measure_recall(
                self.base.model,
                next((one.predictor for one in together if one.predictor is not None), None),
                self.batches,
                [one.policy for one in together],
                tuple(selections),
                selection=next(iter(selections.values())),
                rows=self.config.attention_rows,
                score_dtype=self.config.score_dtype,
                prompt_tokens=self.config.prompt_tokens,
            )
            self.found |= {one.label: found for one in together}
            self.expected = [(one, theirs) for one, theirs in self.expected if one.label not in self.found]
        found = self.found.pop(policy.label)
        name = policy.policy.name
        rows = [
            self.make_row(policy, "recalled_mass", mass, budget=budget, attended=found.attended[name][budget].value)
            for budget, mass in found.mass[name].items()
        ]
        rows += [
            self.make_row(policy, "tied", tied, budget=budget, attended=found.attended[name][budget].value)
            for budget, tied in found.tied.get(name, {}).items()
            if tied.value > TIED
        ]
        of_budgets = found.distances.get(name, {})
        arrays = {"distances": [{"budget": budget} | one for budget, one in of_budgets.items()]} if of_budgets else {}
        if name not in found.hit_rate:
            return Cell(rows, arrays)
        for metric, estimates in (("hit_rate", found.hit_rate), ("spearman", found.spearman)):
            if name in estimates:  # very short documents have no correlation
                rows.append(self.make_row(policy, metric, estimates[name], budget=None, attended=None))
        arrays["hit_rate"] = list_known(found.by_head[name])
        if name in found.reliability:
            arrays["reliability"] = found.reliability[name]
        return Cell(rows, arrays)

    def _together(
        self, policy: EvaluatedPolicy, selections: dict[float | int, SelectionConfig]
    ) -> list[EvaluatedPolicy]:
        """The policy, and those expected that can share its pass: by the same selections and at most one predictor."""
        together = [policy]
        for other, theirs in self.expected:
            predictors = {id(one.predictor) for one in (*together, other) if one.predictor is not None}
            names = {one.policy.name for one in together}
            if theirs == selections and other.policy.name not in names and len(predictors) <= 1:
                together.append(other)
        return together
