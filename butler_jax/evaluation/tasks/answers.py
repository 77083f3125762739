"""Tasks that ask for an answer. A token of the answer is right where it is the greedy prediction.

The model is teacher-forced through a sample in one pass. It predicts all tokens of an answer if and only if greedy
decoding, with every position limited to its own choice, would write that answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from butler_jax.data import Batch, pad_rows
from butler_jax.evaluation.cells import Cell
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.tasks.base import Task
from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.parallel import hash_arrays
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Estimate, estimate_share
from butler_jax.weights import Base

MULTIPLE = 32  # lengths are padded to a multiple, so that other samples rarely compile anew

SampleGroup = tuple[
    dict[str, float | int | str], Int[np.ndarray, " members"]
]  # a label, and the numbers of its samples


@dataclass(frozen=True)
class Answers:
    """Counts of samples, in the order of the batches' rows without padding.

    Attributes:
        right: Tokens of the answer that are the greedy ones.
        asked: Tokens of the answer.
        attended: The attended fractions of a sample's tokens, summed.
        of_dense: What they read in all layers, as shares of what a dense pass reads, summed.
        tokens: Tokens of the sample that read a choice: all, or those that predict the answer after a prompt.
    """

    right: Int[np.ndarray, " samples"]
    asked: Int[np.ndarray, " samples"]
    attended: Float[np.ndarray, " samples"]
    of_dense: Float[np.ndarray, " samples"]
    tokens: Int[np.ndarray, " samples"]

    def take(self, members: Int[np.ndarray, " members"]) -> Answers:
        """Some of the samples, by number."""
        return Answers(*(getattr(self, field.name)[members] for field in fields(self)))

    @property
    def whole(self) -> Bool[np.ndarray, " samples"]:
        """Which samples are answered without a wrong token."""
        return self.right == self.asked

    @property
    def accuracy(self) -> Estimate:
        """Share of samples without a wrong token."""
        return estimate_share(self.whole, np.ones_like(self.asked))

    @property
    def miss_rate(self) -> Estimate:
        """Share of samples with a wrong token."""
        return estimate_share(~self.whole, np.ones_like(self.asked))

    @property
    def token_inaccuracy(self) -> Estimate:
        """Share of wrong tokens."""
        return estimate_share(self.asked - self.right, self.asked)

    @property
    def share_read(self) -> float:
        """The mean attended fraction."""
        return float(self.attended.sum() / self.tokens.sum())

    @property
    def share_of_dense(self) -> float:
        """The mean share of what a dense pass reads."""
        return float(self.of_dense.sum() / self.tokens.sum())


def batch_answers(
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]], *, batch_size: int = 4, context: int | None = None
) -> list[Batch]:
    """Make batches of one length from samples: their tokens, and which of them are asked for.

    The batches hold tokens, segments, positions and `asked`, all [B, T]. T is the longest sample's length, padded to a
    multiple of MULTIPLE but not beyond the model's `context`.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    length = -(-longest // MULTIPLE) * MULTIPLE
    length = length if context is None else max(min(length, context), longest)
    tokens, asked = zip(*rows, strict=True)
    return pad_rows(tokens, length, batch_size=batch_size, asked=asked)


def count_answers(
    passes: Passes,
    batches: Sequence[Batch],
    policy: Policy,
    selection: SelectionConfig,
    predictor: Predictor | None = None,
) -> Answers:
    """Count the right answers on batches of `batch_answers` under a policy and a budget. Compiles once per length."""
    parts = []
    for batch in batches:
        asked, real = batch["asked"], batch["segments"] > 0
        wanted = np.pad(asked[:, 1:], ((0, 0), (0, 1)))
        found = passes(batch, policy, selection, predictor, wanted=wanted)
        limited = wanted if passes.prompted else real
        guessed = np.pad(found.greedy[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        good = (guessed == batch["tokens"]) & asked
        shares = (np.where(limited, a.astype(np.float64), 0.0) for a in (found.attended, found.of_dense))
        used = asked.any(axis=1)
        parts.append([a.sum(axis=1)[used] for a in (good, asked, *shares, limited)])
    return Answers(*(np.concatenate(a) for a in zip(*parts, strict=True)))


def group_by_label(labels: Sequence[dict[str, float | int | str]]) -> list[SampleGroup]:
    """Group samples by label, in the order of each label's first sample."""
    different = [label for number, label in enumerate(labels) if label not in labels[:number]]
    return [(one, np.flatnonzero([label == one for label in labels])) for one in different]


def group_by_distance(distances: Sequence[int], bins: int = 3) -> list[SampleGroup]:
    """Group samples by distance in tokens into at most `bins` groups of about equal size, nearest first.

    Samples of one distance stay together. A label is {"distance": "200-240"}: the least and the greatest distance of
    its samples.
    """
    distances = np.asarray(distances)
    ranked = np.sort(distances)
    # A sample's group follows from how many are nearer, the same number for all of its distance.
    group = np.searchsorted(ranked, distances) * bins // max(len(distances), 1)
    parts = []
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        within = distances[members]
        parts.append(({"distance": f"{within.min()}-{within.max()}"}, members))
    return parts


class AnsweringTask(Task):
    """Base class of tasks whose samples ask for an answer: rows for all samples, and for each group of them.

    Attributes:
        metrics: The properties of `Answers` that are reported.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, base: Base, config: EvalConfig, batches: Sequence[Batch], groups: Sequence[SampleGroup]):
        super().__init__(base, config, {"batches": hash_arrays(batches)})
        self.batches, self.groups = batches, groups
        self.passes = Passes(base.model, prompted=config.prompt_tokens > 0, score_dtype=config.score_dtype)

    def expect(self, cells):
        """Read prompts once for policies with and without a predictor."""
        self.passes.expect(policy.predictor for policy, _ in cells)

    def evaluate(self, policy, selections):
        """Measure one budget."""
        ((budget, selection),) = selections.items()
        found = count_answers(self.passes, self.batches, policy.policy, selection, policy.predictor)
        parts = [({}, found), *((label, found.take(members)) for label, members in self.groups)]
        rows = []
        for name in self.metrics:
            for label, part in parts:
                read = dict(attended=part.share_read, of_dense=part.share_of_dense)
                rows.append(self.make_row(policy, name, getattr(part, name), budget=budget, where=label, **read))
        return Cell(rows)
