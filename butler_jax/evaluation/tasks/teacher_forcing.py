"""Answers judged in one pass: the tokens asked for, counted where they are the greedy ones.

The model is teacher-forced through a sample. It predicts all tokens of an answer if and only if greedy decoding, with
every position limited to its own choice, would write that answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Estimate, share

MULTIPLE = 32  # lengths are padded to a multiple, so that other samples rarely compile anew

Batch = dict[str, np.ndarray]
Part = tuple[dict[str, float | int | str], Int[np.ndarray, " M"]]  # what a detail is about, and the samples in it


@dataclass(frozen=True)
class Answers:
    """Counts of N samples, in the order of the batches' rows, rows of padding left out.

    right, asked: tokens of the answers that are the greedy ones, and all of them. attended: the attended fractions of a
    sample's tokens, summed. tokens: how many these are.
    """

    right: Int[np.ndarray, " N"]
    asked: Int[np.ndarray, " N"]
    attended: Float[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"]

    def of(self, members: np.ndarray) -> Answers:
        """Some of the samples, by number."""
        return Answers(*(a[members] for a in (self.right, self.asked, self.attended, self.tokens)))

    @property
    def whole(self) -> Bool[np.ndarray, " N"]:
        """Which samples are answered without a wrong token."""
        return self.right == self.asked

    @property
    def accuracy(self) -> Estimate:
        """Share of samples without a wrong token."""
        return share(self.whole, np.ones_like(self.asked))

    @property
    def miss_rate(self) -> Estimate:
        """Share of samples with any token wrong."""
        return share(~self.whole, np.ones_like(self.asked))

    @property
    def token_inaccuracy(self) -> Estimate:
        """Share of tokens wrong."""
        return share(self.asked - self.right, self.asked)

    @property
    def share_read(self) -> float:
        """The mean attended fraction."""
        return float(self.attended.sum() / self.tokens.sum())


def answer_batches(
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]], *, batch_size: int = 4, context: int | None = None
) -> list[Batch]:
    """Samples, each its tokens and which of them are asked for, as batches of one length.

    A batch holds tokens, segments, positions and `asked`, all [batch_size, T]: T is the longest sample's length, padded
    to a multiple, up to `context`. The last batch is filled with empty rows.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    length = -(-longest // MULTIPLE) * MULTIPLE
    length = length if context is None else max(min(length, context), longest)
    batch_size = min(batch_size, len(rows))
    count = -(-len(rows) // batch_size) * batch_size
    whole = {name: np.zeros((count, length), np.int32) for name in ("tokens", "segments", "positions")}
    whole["asked"] = np.zeros((count, length), bool)
    whole["positions"][:] = np.arange(length, dtype=np.int32)
    for row, (tokens, asked) in enumerate(rows):
        whole["tokens"][row, : len(tokens)] = tokens
        whole["segments"][row, : len(tokens)] = 1
        whole["asked"][row, : len(tokens)] = asked
    return [{n: a[i : i + batch_size] for n, a in whole.items()} for i in range(0, count, batch_size)]


def answers(
    passes: Passes,
    batches: Sequence[Batch],
    policy: Policy,
    config: SelectionConfig,
    predictor: Predictor | None = None,
) -> Answers:
    """What a model answers on batches of answer_batches under a policy and a budget. Compiles once a length."""
    parts = []
    for batch in batches:
        asked, real = batch["asked"], batch["segments"] > 0
        told = passes(batch, policy, config, predictor, wanted=np.pad(asked[:, 1:], ((0, 0), (0, 1))))
        guessed = np.pad(told.greedy[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        good = (guessed == batch["tokens"]) & asked
        attended = np.where(real, told.attended.astype(np.float64), 0.0)
        used = asked.any(axis=1)
        parts.append([a.sum(axis=1)[used] for a in (good, asked, attended, real)])
    return Answers(*(np.concatenate(a) for a in zip(*parts, strict=True)))


def by_label(labels: Sequence[dict[str, float | int | str]]) -> list[Part]:
    """Samples grouped by label: each different label, in order of its first sample, with the numbers of its samples."""
    different = [label for number, label in enumerate(labels) if label not in labels[:number]]
    return [(one, np.flatnonzero([label == one for label in labels])) for one in different]


def by_distance(distances: Sequence[int], bins: int = 3) -> list[Part]:
    """Samples grouped by distance in tokens into at most `bins` groups of about equal size, nearest first.

    A label is {"distance": "200-240"}, the least and the greatest distance of its samples. Samples of one distance stay
    together.
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
