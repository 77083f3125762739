"""The settings that are timed, and the bytes that each of them must move."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model's attention: query heads H, KV heads K, head dimension D and rank R of k_imp."""

    heads: int
    kv_heads: int
    dim: int
    rank: int = 16
    layers: int = 32
    weights: int = 0  # parameters of the whole model


SHAPES = {
    "llama8b": Shape(heads=32, kv_heads=8, dim=128, layers=32, weights=8_030_261_248),
    "llama1b": Shape(heads=32, kv_heads=8, dim=64, layers=16, weights=1_235_814_400),
    "smollm2": Shape(heads=9, kv_heads=3, dim=64, layers=30, weights=134_515_008),
}


def count_tokens(budget: Fraction | int, context: int) -> int:
    """The tokens that a budget attends of a context: a fraction of it, or a number."""
    return budget if isinstance(budget, int) else -(-context * budget.numerator // budget.denominator)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of the benchmark."""

    shape: Shape
    context: int
    batch: int
    tokens: int  # attended of the cache, a row and KV head
    dtype: Any
    unit: int = 1
    pooling: str = "normalised"
    int8: bool = False
    together: int = 1  # layers whose choices are made in one go, as in a decode step
    implementation: str | None = None

    @property
    def units(self) -> int:
        """N, the chosen units of a row."""
        return -(-self.tokens // self.unit)

    @property
    def tokens_read(self) -> int:
        """The tokens of the chosen units of a row."""
        return min(self.units * self.unit, self.context)

    @property
    def dense_bytes(self) -> float:
        """Bytes that dense decode attention reads in one layer: all keys and values."""
        shape = self.shape
        return 2.0 * self.batch * shape.kv_heads * self.context * shape.dim * jnp.dtype(self.dtype).itemsize

    def sparse_bytes(self, interval: int) -> float:
        """Bytes that a sparse step reads and writes in one layer on average: chosen keys and values, k_imp and scores.

        Every `interval` steps k_imp is read, and the scores are written and read once in float32.
        """
        rows = self.batch * self.shape.kv_heads
        item = jnp.dtype(self.dtype).itemsize
        k_imp = rows * self.context * self.shape.rank * (1 if self.int8 else item)
        scores = 2 * rows * self.context * 4
        return (k_imp + scores) / interval + 2.0 * rows * self.tokens_read * self.shape.dim * item

    def speeds(self, interval: int, dense: float, first: float, again: float) -> dict[str, float]:
        """Seconds of a step, beside dense attention and the byte cap.

        Args:
            dense: Seconds of dense attention.
            first: Seconds of a step that chooses.
            again: Seconds of one that keeps its choice.
        """
        spent = (first + (interval - 1) * again) / interval
        cap = self.dense_bytes / self.sparse_bytes(interval)
        return dict(seconds=spent, speedup=dense / spent, cap=cap, share_of_cap=dense / spent / cap)

    def model_cap(self, interval: int) -> float:
        """The speed-up of a whole decode step if only bytes count. It also reads the weights, once for the batch."""
        weights = self.shape.weights * jnp.dtype(self.dtype).itemsize
        dense, sparse = (self.shape.layers * part for part in (self.dense_bytes, self.sparse_bytes(interval)))
        return (weights + dense) / (weights + sparse)
