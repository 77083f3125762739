"""Settings of a predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The kind of a predictor and its sizes.

    Attributes:
      kind: a name in PREDICTORS.
      rank: R, the length of q_imp and k_imp; even.
      stride: P, the number of layers that one producer serves. The contextual predictor has a single producer and
        ignores it.
      hidden: I, the inner width of the contextual and producer predictors; None is 512.
    """

    kind: Literal["lookahead", "producer", "contextual"] = "lookahead"
    rank: int = 16
    stride: int = 4
    hidden: int | None = None

    def __post_init__(self):
        if self.rank <= 0 or self.rank % 2:
            raise ValueError(f"rank must be positive and even, got {self.rank}")
        if self.stride <= 0:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.hidden is not None and self.hidden <= 0:
            raise ValueError(f"hidden must be positive, got {self.hidden}")
