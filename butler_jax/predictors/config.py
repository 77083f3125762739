"""Settings of a predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Which predictor, and its sizes.

    rank is R; stride is P, how many layers one producer serves (the contextual predictor has a single producer and
    ignores it); hidden is the inner width I of the contextual and producer predictors (None: 512).
    """

    kind: Literal["lookahead", "producer", "contextual"] = "lookahead"
    rank: int = 16
    stride: int = 4
    hidden: int | None = None

    def __post_init__(self):
        if not (self.rank > 0 and self.rank % 2 == 0):
            raise ValueError(f"rank must be positive and even, got {self.rank}")
        if not self.stride > 0:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.hidden is not None and not self.hidden > 0:
            raise ValueError(f"hidden must be positive, got {self.hidden}")
