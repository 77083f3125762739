"""What a validation measures of a predictor: its loss, and how well it finds the tokens that attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Float

from butler_jax.model import BaseModel
from butler_jax.policies import make_policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import measure_recall
from butler_jax.training.objective import DistillationObjective

RECALL_BUDGET = 0.25
"""The budget of the recalled mass that is logged."""

RECALL_ROWS = 256
"""Query rows of each held-out row of text on which recall is measured."""


@dataclass(frozen=True)
class Validation:
    """The held-out batches of a run, on the mesh, and what is measured on them."""

    objective: DistillationObjective
    model: BaseModel
    held_out: list[dict[str, jax.Array]]

    def measure(self, predictor: Predictor) -> dict[str, float]:
        """{"validation_loss", "recalled_mass"} of the predictor, and "hit_rate" where a row has contested keys."""
        sums = [_loss_and_count(self.objective, predictor, self.model, batch) for batch in self.held_out]
        loss, count = (sum(float(x) for x in column) for column in zip(*sums, strict=True))
        found = measure_recall(
            self.model,
            predictor,
            self.held_out,
            [make_policy("tokenbutler")],
            [RECALL_BUDGET],
            selection=SelectionConfig(sinks=self.objective.sinks, recent=max(self.objective.recent, 1)),
            rows=RECALL_ROWS,
            ranks=False,
            implementation=self.objective.implementation,
        )
        measured = {
            "validation_loss": loss / max(count, 1.0),
            "recalled_mass": found.mass["tokenbutler"][RECALL_BUDGET].value,
        }
        if "tokenbutler" in found.hit_rate:
            measured["hit_rate"] = found.hit_rate["tokenbutler"].value
        return measured


@partial(jax.jit, static_argnames="objective")
def _loss_and_count(objective, predictor, model, batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Loss sum and count without dropout; the compiler leaves the gradient out."""
    return objective.differentiate(predictor, model, batch)[:2]
