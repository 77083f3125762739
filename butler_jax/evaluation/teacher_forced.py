"""Answers inside a text: the model is shown the whole text, and its greedy tokens are compared with the answer's.

As far as they are all right they are what greedy decoding would write, with every position limited to its own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from butler_jax.configs import SelectionConfig
from butler_jax.evaluation.passes import Passes
from butler_jax.evaluation.statistics import Estimate, ratio
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor


@dataclass(frozen=True)
class Answers:
    """Of each of N samples: tokens of the answer predicted right, how many it has, and sums over its rows.

    attended: fraction of the causal keys read in layers 1 ..., summed over the `rows` tokens of the sample.
    """

    right: Int[np.ndarray, " N"]
    asked: Int[np.ndarray, " N"]
    attended: Float[np.ndarray, " N"]
    rows: Int[np.ndarray, " N"]

    def of(self, chosen: np.ndarray) -> Answers:
        """Some of the samples, by a mask or by index."""
        return Answers(*(a[chosen] for a in (self.right, self.asked, self.attended, self.rows)))

    @property
    def accuracy(self) -> Estimate:
        """Share of samples with every token right."""
        return ratio(self.right == self.asked, np.ones_like(self.asked))

    @property
    def miss_rate(self) -> Estimate:
        """Share of samples with any token wrong."""
        return ratio(self.right < self.asked, np.ones_like(self.asked))

    @property
    def token_inaccuracy(self) -> Estimate:
        """Share of tokens wrong."""
        return ratio(self.asked - self.right, self.asked)

    @property
    def share_read(self) -> float:
        """The mean attended fraction."""
        return float(self.attended.sum() / self.rows.sum())


def answers(
    passes: Passes,
    batches: Sequence[dict[str, np.ndarray]],
    policy: Policy,
    config: SelectionConfig,
    predictor: Predictor | None = None,
) -> Answers:
    """Run batches (tokens, segments, positions; asked: the tokens of the answers); rows of padding are no sample."""
    found = []
    for batch in batches:
        asked, real = batch["asked"], batch["segments"] > 0
        before = np.zeros_like(asked)
        before[:, :-1] = asked[:, 1:]
        told = passes(batch, policy, config, predictor, wanted=before)
        guessed = np.full_like(batch["tokens"], -1)
        guessed[:, 1:] = told.greedy[:, :-1]
        right = ((guessed == batch["tokens"]) & asked).sum(axis=1)
        attended = np.where(real, told.attended.astype(np.float64), 0).sum(axis=1)
        used = asked.any(axis=1)
        found.append([a[used] for a in (right, asked.sum(axis=1), attended, real.sum(axis=1))])
    return Answers(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def by_distance(distances: Int[np.ndarray, " N"], bins: int = 3) -> dict[str, np.ndarray]:
    """Samples in groups of about equal size by a distance in tokens: {"200-240": indices, ...}."""
    order = np.argsort(distances, kind="stable")
    groups = [g for g in np.array_split(order, min(bins, len(order))) if len(g)]
    return {f"{distances[g].min()}-{distances[g].max()}": g for g in groups}
