"""Settings of sampling: how the next token is drawn from the logits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. The defaults decode greedily.

    Raises:
        ValueError: A setting is out of its range.
    """

    temperature: float = 0.0
    """Divisor of the logits before the draw. 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from the k most likely tokens only. Default: all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities sum to at least p. Applies after top_k."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens that the row already holds by this number, and multiply the negative ones
    (Keskar et al. 2019, CTRL). 1 changes nothing."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"the temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"the repetition penalty must be above 0, got {self.repetition_penalty}")
