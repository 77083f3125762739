"""Estimates with standard errors. Tokens of a sequence depend on each other, so errors are taken over sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float


class Estimate(NamedTuple):
    """A value, its standard error (None where a single sequence was seen), and how many items it is a mean of.

    sequences: the N windows or samples that these items lie in, over which the error is taken.
    """

    value: float
    error: float | None
    n: int
    sequences: int

    def through(self, function: Callable[[float], float], slope: float) -> Estimate:
        """The estimate of a function of the value; slope: its derivative there (the delta method)."""
        error = None if self.error is None else abs(slope) * self.error
        return self._replace(value=function(self.value), error=error)

    def exp(self) -> Estimate:
        """Of the exponential: a perplexity from a mean negative log-likelihood."""
        return self.through(math.exp, math.exp(self.value))


def ratio(sums: Float[Array, " N"], counts: Float[Array, " N"]) -> Estimate:
    """sum(sums) / sum(counts) over N sequences, and its standard error as a ratio estimator's.

    That is sqrt(N / (N - 1) sum_i (s_i - value c_i)^2) / sum(c) (Cochran, Sampling Techniques, section 6.3): it takes
    sequences for independent, and is too small for windows that overlap. Sequences that count nothing are left out.
    Raises ValueError where nothing was counted.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        raise ValueError("there is nothing to take a mean of: no sequence has an item that counts")
    value, error = sums.sum() / counts.sum(), None
    if len(counts) > 1:
        rest = sums - value * counts
        error = float(np.sqrt(len(rest) / (len(rest) - 1) * np.sum(rest**2)) / counts.sum())
    return Estimate(float(value), error, int(counts.sum()), len(counts))


def share(sums: Float[Array, " N"], counts: Float[Array, " N"]) -> Estimate:
    """`ratio` of a share whose items are all right or wrong, with an error that is not 0 where all of them agree.

    There the standard error knows nothing: the error is 1 / (N + 1), which is how far the Wilson interval of one
    standard error reaches from 0 and 1 (Wilson 1927, JASA 22, 209-212; n = N sequences, z = 1).
    """
    found = ratio(sums, counts)
    if found.error is None or 0 < found.value < 1:
        return found
    return found._replace(error=1 / (found.sequences + 1))
