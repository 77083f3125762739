"""How much of the true attention the chosen keys hold."""

from __future__ import annotations

from collections.abc import Sequence

from butler_jax.data import Batch
from butler_jax.evaluation.cells import Cell
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.hashes import hash_arrays
from butler_jax.evaluation.tasks.base import Task
from butler_jax.evaluation.tasks.perplexity import list_known
from butler_jax.evaluation.tasks.texts import name_windows
from butler_jax.selection import LIMITED
from butler_jax.simulation import measure_recall
from butler_jax.weights import Base

TIED = 0.01  # a share of ties that is worth a line of the report


class AttentionTask(Task):
    """Recalled attention mass, hit rate and rank correlation on the windows of perplexity."""

    name = "attention"
    at_once = True

    def __init__(self, base: Base, config: EvalConfig, batches: Sequence[Batch]):
        super().__init__(base, config, {"batches": hash_arrays(batches), "rows": config.attention_rows})
        self.batches, self.unit = batches, name_windows(config)

    def takes(self, policy):
        """Every policy that does not read everything; under a tolerance and top-p, budgets are not tables of tokens."""
        return not policy.dense and policy.allocation not in LIMITED

    def evaluate(self, policy, selections):
        """Measure all budgets."""
        found = measure_recall(
            self.base.model,
            policy.predictor,
            self.batches,
            [policy.policy],
            tuple(selections),
            selection=next(iter(selections.values())),
            rows=self.config.attention_rows,
            score_dtype=self.config.score_dtype,
            prompt_tokens=self.config.prompt_tokens,
        )
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
        if name not in found.hit_rate:
            return Cell(rows)
        for metric, estimates in (("hit_rate", found.hit_rate), ("spearman", found.spearman)):
            if name in estimates:  # very short documents have no correlation
                rows.append(self.make_row(policy, metric, estimates[name], budget=None, attended=None))
        return Cell(rows, {"hit_rate": list_known(found.by_head[name])})
