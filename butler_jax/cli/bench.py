"""`butler-jax bench`: tokens per second, dense and sparse, beside transformers on torch.

All variants have the same weights, prompt and process. They take turns, so that other load on the machine slows all of
them alike. The median round counts.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from butler_jax.cli.command_line import read, run
from butler_jax.selection import SelectionConfig, parse_budget


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
    selection: SelectionConfig = field(default=SelectionConfig(), metadata={"flags": ("unit",)})
    """How tokens are chosen. Each of --budgets and --intervals replaces its budget and interval."""
    pooling: Literal["normalised", "maximum"] = "normalised"
    """How the scores of a group's heads are combined."""
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
        for name in ("batch", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        self.selections()
        if not self.lengths():
            raise ValueError("--contexts names no context; give for instance 1024,4096")

    def lengths(self) -> list[int]:
        """The contexts as numbers."""
        return [_whole(part, "--contexts") for part in self.contexts.split(",") if part]

    def selections(self) -> list[SelectionConfig]:
        """Every budget at every interval."""
        budgets = [parse_budget(part) for part in self.budgets.split(",") if part]
        intervals = [_whole(part, "--intervals") for part in self.intervals.split(",") if part]
        return [replace(self.selection, budget=b, interval=i) for b in budgets for i in intervals]


def _whole(text: str, name: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"{name}: {text!r} is not a whole number")
    return int(text)


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit status."""
    return run(lambda: _bench(read(BenchConfig, arguments, "butler-jax bench")))


def _bench(config: BenchConfig) -> int:
    """Measure, print and write the figures."""
    import jax

    from butler_jax.cli.decoding_rounds import load_peer, measure
    from butler_jax.predictors import PredictorConfig, make_predictor
    from butler_jax.runs import load_predictor, versions
    from butler_jax.weights import load_base

    base = load_base(config.base, dtype=config.dtype)
    if config.run is None:
        predictor = make_predictor(base.config, PredictorConfig(rank=min(16, base.config.head_dim)))
    else:
        predictor = load_predictor(config.run, base)
    peer = load_peer(config, base) if config.peer else None
    rows = []
    for context in config.lengths():
        if context > base.config.context:
            print(f"{context} tokens are beyond the model's context of {base.config.context}: left out", flush=True)
            continue
        rows += measure(config, base, predictor, peer, context)
    about = {
        "base": base.name,
        "device": f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "dtype": str(base.model.embedding[...].dtype),
        "versions": versions(),
    }
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps({"rows": rows, **about}, indent=2) + "\n", encoding="utf-8")
    print(f"load {about['load'][0]:.1f} on {about['cores']} cores; {about['dtype']}", flush=True)
    return 0
