"""Passes that have been run already are not run again: in short rows several budgets often mean the same tokens."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from butler_jax.model import BaseModel
from butler_jax.policies import Dense, Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig, budget_table
from butler_jax.simulation import simulate


class Told(NamedTuple):
    """What a pass says of each row's next token, and the fraction of its causal keys that a row read."""

    nll: Float[np.ndarray, "B T"]
    greedy: Int[np.ndarray, "B T"]
    attended: Float[np.ndarray, "B T"]


class Passes:
    """`simulate` on one model, remembering what it gave: for a batch, a policy, and the tokens its rows may read."""

    def __init__(self, model: BaseModel, *, score_dtype: str | None = None, implementation: str | None = None):
        self.model, self.options = model, dict(score_dtype=score_dtype, implementation=implementation)
        self._told: dict[Any, Told] = {}
        self._predictors: dict[int, Predictor] = {}  # kept alive, so that no other takes its id

    def __call__(
        self,
        batch: dict[str, np.ndarray],
        policy: Policy,
        selection: SelectionConfig,
        predictor: Predictor | None = None,
        *,
        wanted: Bool[np.ndarray, "B T"],
    ) -> Told:
        """As `simulate`; rows that are not wanted mean nothing. Where every row may read everything, dense."""
        longest = int((batch["segments"] > 0).sum(axis=1).max())
        limits = policy.selection(selection)
        table = budget_table(limits, longest)
        if limits.threshold is None and (table == np.arange(longest + 1)).all():
            policy, predictor = Dense(), None
        if not policy.needs_predictor:
            predictor = None
        place = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in (*_inputs(batch), wanted))).digest()
        key = place, batch["tokens"].shape, policy, id(predictor), table.tobytes(), limits.rule
        if key not in self._told:
            self._predictors[id(predictor)] = predictor
            found = simulate(
                self.model, batch, policy, selection, predictor, wanted=jnp.asarray(wanted), **self.options
            )
            self._told[key] = Told(*(np.asarray(a) for a in (found.nll, found.greedy, found.attended)))
        return self._told[key]


def _inputs(batch):
    return (batch[name] for name in ("tokens", "segments", "positions"))
