"""Passes that run only once: in short rows, several budgets often let a row read equally many tokens.

Where rows are prompts, all passes over a batch share one dense pass over these.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from butler_jax.data import Batch
from butler_jax.model import BaseModel
from butler_jax.parallel import memory_of, on_host
from butler_jax.policies import Dense, Policy, Scoring
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig, budget_table
from butler_jax.simulation import ReadPrompts, Simulated, read_prompts, simulate

LEAST_ROWS = 32  # that run after a prompt, so that answers of different lengths rarely compile anew
KEPT_PROMPTS = 1 / 4  # of the memory of the device, or of the machine
UNTOLD = 8 << 30  # bytes of memory, where nothing tells


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
        self._reader: Predictor | None = None  # with which prompts are read also for policies without predictor
        self._prompts: OrderedDict[Any, ReadPrompts] = OrderedDict()

    def expect(self, predictors: Iterable[Predictor | None]) -> None:
        """Name the predictors that will come: prompts are then read once for the first and for policies without."""
        self._reader = next((one for one in predictors if one is not None), self._reader)

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
        limits = table.tobytes(), chosen.rule, chosen.tolerance, chosen.threshold, chosen.min_context
        key = content, batch["tokens"].shape, policy, id(predictor), *limits
        if key not in self._found:
            self._predictors[id(predictor)] = predictor
            ends = AlignedEnds.of(batch, wanted) if self.prompted else None
            if ends is None or not isinstance(policy, Scoring) or chosen.interval > 1:
                prompts = wanted.argmax(axis=1) if self.prompted else None
                options = dict(prompts=prompts, wanted=jnp.asarray(wanted), **self.options)
                found = _on_host(simulate(self.model, batch, policy, selection, predictor, **options))
            else:
                read = self._read(content, ends, predictor)
                options = dict(prompts=ends.prompts, wanted=jnp.asarray(ends.wanted), read=read, **self.options)
                found = ends.restore(simulate(self.model, ends.batch, policy, selection, predictor, **options))
            self._found[key] = found
        return self._found[key]

    def _read(self, content: bytes, ends: AlignedEnds, predictor: Predictor | None) -> ReadPrompts:
        """The prompts of a batch as a predictor needs them; the last ones are kept, up to a share of the memory."""
        reader = self._reader if predictor is None else predictor
        key = content, id(reader)
        if key not in self._prompts:
            how = dict(implementation=self.options["implementation"])
            self._prompts[key] = read_prompts(self.model, ends.batch, ends.first, reader, **how)
            most = KEPT_PROMPTS * (memory_of(jax.devices()[0]) or UNTOLD)
            while len(self._prompts) > 1 and sum(read.bytes for read in self._prompts.values()) > most:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        found = self._prompts[key]
        return found.without_predictor() if predictor is None else found


class AlignedEnds(NamedTuple):
    """A batch of one document a row, moved so that the tokens after the last row wanted are cut off.

    All rows end in the last column, so that the rows after the prompts are the last columns of the batch.

    Attributes:
        batch: tokens, segments, positions [B, S].
        wanted: The rows wanted among the last T.
        prompts: Tokens of each prompt.
        shift: How many columns each row was moved to the right.
    """

    batch: Batch
    wanted: Bool[np.ndarray, "B T"]
    prompts: Int[np.ndarray, " B"]
    shift: Int[np.ndarray, " B"]

    @classmethod
    def of(cls, batch: Batch, wanted: Bool[np.ndarray, "B S"]) -> AlignedEnds | None:
        """The aligned batch; None where more than half of it would run after the prompts."""
        size, used = wanted.shape[1], wanted.any(axis=1)
        prompts = wanted.argmax(axis=1) * used
        ends = (size - wanted[:, ::-1].argmax(axis=1) + 1) * used  # the token after the last row is its target
        rows = max(LEAST_ROWS, 1 << int(max(ends - prompts) - 1).bit_length())
        if rows > size // 2 or (batch["positions"] != np.arange(size)[None])[batch["segments"] > 0].any():
            return None
        shift = size - np.minimum(ends, size)
        place = np.arange(size)[None] - shift[:, None]
        moved = {name: _take(batch[name], place) for name in ("tokens", "segments", "positions")}
        return cls(moved, _take(wanted, place)[:, -rows:], prompts, shift)

    @property
    def first(self) -> int:
        """The first column after the prompts."""
        return self.batch["tokens"].shape[1] - self.wanted.shape[1]

    def restore(self, found: Simulated) -> RowPredictions:
        """The predictions at the places where the rows were; 0 elsewhere."""
        place = np.arange(self.batch["tokens"].shape[1])[None] + self.shift[:, None] - self.first
        return RowPredictions(*(_take(array, place) for array in _on_host(found)))


def _take(array: Shaped[np.ndarray, "B _"], place: Int[np.ndarray, "B S"]) -> Shaped[np.ndarray, "B S"]:
    """The entries at the places of each row; 0 where a place is outside."""
    inside = (place >= 0) & (place < array.shape[1])
    taken = np.take_along_axis(array, np.clip(place, 0, array.shape[1] - 1), axis=1)
    return np.where(inside, taken, np.zeros((), array.dtype))


def _on_host(found: Simulated) -> RowPredictions:
    return RowPredictions(*(on_host(getattr(found, name)) for name in RowPredictions._fields))
