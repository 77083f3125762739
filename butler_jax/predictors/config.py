"""Settings of predictors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The kind of a predictor and its sizes.

    Raises:
        ValueError: A size is out of its range.
    """

    kind: Literal["lookahead", "producer", "contextual"] = field(default="lookahead", metadata={"flag": "predictor"})
    """lookahead (ours), producer (the paper's second version) or contextual (its first)."""
    rank: int = 16
    """R, the length of q_imp and k_imp; even."""
    stride: int = 4
    """P, the number of layers that one producer serves. The contextual predictor has a single producer and ignores
    it."""
    hidden: int | None = None
    """Hidden width I of the predictors contextual and producer. Default: 512."""

    def __post_init__(self):
        if self.rank <= 0 or self.rank % 2:
            raise ValueError(f"rank must be positive and even, got {self.rank}")
        if self.stride <= 0:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.hidden is not None and self.hidden <= 0:
            raise ValueError(f"hidden must be positive, got {self.hidden}")
