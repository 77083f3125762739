"""Settings of `butler-jax bench`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from butler_jax.selection import SelectionConfig, parse_budget
from butler_jax.storage import require_positive


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time decoding. Lists are comma-separated.

    The prompt is random tokens: what a step costs does not depend on what it reads.
    """

    base: str = "tiny"
    """A Hugging Face directory, a hub id, a .gguf file, or tiny (embedded)."""
    run: Path | None = None
    """A training run with the predictor. Default: an untrained lookahead predictor, which costs the same."""
    contexts: str = "1024,4096,8192"
    """Tokens held at the end of the measurement; those beyond the model's context are left out."""
    budgets: str = "1/4,1/16"
    """Budgets of sparse decoding: shares of the context, or numbers of tokens."""
    intervals: str = "1,8"
    """Steps from one choice to the next."""
    selection: SelectionConfig = field(default=SelectionConfig(), metadata={"flags": ("unit", "tail")})
    """How tokens are chosen. Each of --budgets and --intervals replaces its budget and interval. Under a tail, every
    variant is timed without it too."""
    pooling: Literal["normalised", "maximum"] = "normalised"
    """How the scores of a group's heads are combined; a predictor with an offset decides it itself."""
    batch: int = 1
    """Rows decoded together."""
    tokens: int = 16
    """Tokens a round."""
    rounds: int = 5
    """Rounds of every variant, after one that warms up."""
    peer: bool = True
    """Time transformers on torch too, where both are installed and the base is a Hugging Face directory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision. Default: float32 on CPU, bfloat16 on accelerators."""
    json: Path | None = None
    """File to write the rows to."""

    def __post_init__(self):
        require_positive(self, "batch", "tokens", "rounds")
        self.selections()
        if not self.lengths():
            raise ValueError("--contexts names no context; give for instance 1024,4096")

    def lengths(self) -> list[int]:
        """The contexts as numbers."""
        return [_whole(part, "--contexts") for part in self.contexts.split(",") if part]

    def selections(self) -> list[SelectionConfig]:
        """Every budget at every interval: without a tail, and with the one that was given."""
        budgets = [parse_budget(part) for part in self.budgets.split(",") if part]
        intervals = [_whole(part, "--intervals") for part in self.intervals.split(",") if part]
        tails = dict.fromkeys((0, self.selection.tail))
        return [
            replace(self.selection, budget=b, interval=i, tail=t) for b in budgets for i in intervals for t in tails
        ]


def _whole(text: str, name: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"{name}: {text!r} is not a whole number")
    return int(text)
