"""Passes that run only once: in short rows, several budgets often let a row read equally many tokens."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from butler_jax.data import Batch
from butler_jax.model import BaseModel
from butler_jax.parallel import on_host
from butler_jax.policies import Dense, Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig, budget_table
from butler_jax.simulation import simulate


class RowPredictions(NamedTuple):
    """What a pass predicts after each row.

    Attributes:
        nll: Negative log-likelihood of the next token, in nats.
        greedy: The most likely next token.
        attended: The fraction of the row's causal keys that was read.
        of_dense: The keys that were read in all layers, as a share of those that a dense pass reads.
    """

    nll: Float[np.ndarray, "B T"]
    greedy: Int[np.ndarray, "B T"]
    attended: Float[np.ndarray, "B T"]
    of_dense: Float[np.ndarray, "B T"]


class Passes:
    """`simulate` on one model; results are kept by batch, policy and the number of tokens that rows may read.

    Attributes:
        prompted: Whether the rows before the first one wanted are a prompt, which is read densely.
    """

    def __init__(
        self,
        model: BaseModel,
        *,
        prompted: bool = False,
        score_dtype: str | None = None,
        implementation: str | None = None,
    ):
        self.prompted = prompted
        self.model, self.options = model, dict(score_dtype=score_dtype, implementation=implementation)
        self._found: dict[Any, RowPredictions] = {}
        self._predictors: dict[int, Predictor] = {}  # kept alive, so that no other takes its id

    def __call__(
        self,
        batch: Batch,
        policy: Policy,
        selection: SelectionConfig,
        predictor: Predictor | None = None,
        *,
        wanted: Bool[np.ndarray, "B T"],
    ) -> RowPredictions:
        """Run a pass as `simulate` does, or return its kept result. It is dense where every row may read everything.

        Args:
            batch: tokens, segments, positions [B, T].
            predictor: Needed by policies that rank by a predictor's scores.
            wanted: The rows whose predictions are needed. Those of other rows have no meaning.
        """
        longest = int((batch["segments"] > 0).sum(axis=1).max())
        chosen, everything = policy.selection(selection), np.arange(longest + 1)
        table = everything if chosen is None else budget_table(chosen, longest)
        if chosen is None or (chosen.threshold is chosen.tolerance is None and (table == everything).all()):
            policy, predictor, chosen = Dense(), None, selection
        predictor = policy.require_predictor(predictor)
        arrays = (*(batch[name] for name in ("tokens", "segments", "positions")), wanted)
        content = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).digest()
        limits = table.tobytes(), chosen.rule, chosen.tolerance, chosen.threshold
        key = content, batch["tokens"].shape, policy, id(predictor), *limits
        if key not in self._found:
            self._predictors[id(predictor)] = predictor
            prompts = wanted.argmax(axis=1) if self.prompted else None
            options = dict(prompts=prompts, wanted=jnp.asarray(wanted), **self.options)
            found = simulate(self.model, batch, policy, selection, predictor, **options)
            self._found[key] = RowPredictions(*(on_host(getattr(found, name)) for name in RowPredictions._fields))
        return self._found[key]
