"""Estimates with standard errors. Tokens of a sequence depend on each other, so the errors are over sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A mean with its standard error.

    Attributes:
        value: The mean.
        error: Its standard error over the sequences; None where there is a single one.
        n: How many items (tokens, rows or samples) it is a mean of.
        sequences: How many windows of text or samples these items lie in.
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
        """The estimate of the exponential: a perplexity from a mean negative log-likelihood."""
        return self.through(partial(_unbounded, math.exp), _unbounded(math.exp, self.value))

    def expm1(self) -> Estimate:
        """The estimate of the exponential less 1: how far one perplexity exceeds another."""
        return self.through(partial(_unbounded, math.expm1), _unbounded(math.exp, self.value))


def _unbounded(function: Callable[[float], float], value: float) -> float:
    """The value of a growing function; infinite beyond the largest float."""
    try:
        return function(value)
    except OverflowError:
        return math.inf


def estimate_ratio(sums: ArrayLike, counts: ArrayLike) -> Estimate:
    """Estimate sum(sums) / sum(counts) over n sequences, with the standard error of a ratio estimator.

    The error is sqrt(n / (n - 1) sum_i (s_i - value c_i)^2) / sum(c) (Cochran, Sampling Techniques, section 6.3). It
    assumes independent sequences, so it is too small for windows that overlap. Sequences without items are left out.

    Args:
        sums: [sequences], sums over the items of each sequence.
        counts: [sequences], numbers of items of each sequence.

    Raises:
        ValueError: No sequence has an item.
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


def estimate_share(sums: ArrayLike, counts: ArrayLike) -> Estimate:
    """Estimate the share of items that are right, as `estimate_ratio` does, with an error that is never 0.

    Where all items are right, or all are wrong, the standard error is 0 and says nothing. There the error is 1 / (n +
    1), which is how far the Wilson interval of one standard error reaches from 0 and 1 (Wilson 1927, JASA 22, 209-212;
    n sequences, z = 1).
    """
    found = estimate_ratio(sums, counts)
    if found.error is None or 0 < found.value < 1:
        return found
    return found._replace(error=1 / (found.sequences + 1))
