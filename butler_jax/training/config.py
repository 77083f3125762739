"""Settings of training runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from butler_jax.parallel import HostsConfig
from butler_jax.predictors import PredictorConfig
from butler_jax.selection import AlwaysReadConfig, SelectionConfig, parse_budget
from butler_jax.storage import expand_home, require_local, require_positive, settle_types


@dataclass(frozen=True, kw_only=True)
class FitConfig(HostsConfig):
    """What every training run has: its length, its optimiser, its devices and its directory."""

    data: str = "python_docs"
    """python_docs, coreference, coreference_short, text:PATH[,PATH...], tfds:NAME, or a mixture as A:0.5+B:0.5. PATH is
    a file (.txt, .jsonl, .parquet, also .gz, .zst, .xz), a directory, or - for standard input. #FEATURE after a path or
    name says which feature holds the text."""
    strict_data: bool = False
    """End at the first unreadable line or record of a `text:` source. Default: it is passed over, and a line says how
    many were."""
    data_dir: str | None = None
    """Where prepared data sets lie; may be gs://. Default: the TFDS data directory."""
    steps: int = 300
    """Optimiser steps in all."""
    length: int = 512
    """Tokens in a row."""
    batch_size: int = 4
    """Rows a step, over all devices."""
    accumulate: int = 1
    """Split a batch into this many parts and add their gradients up; saves memory."""
    learning_rate: float | None = None
    """Peak learning rate. Default: what suits the model or predictor being trained."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; a cosine to a tenth of the peak follows."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, of all parameters but norms and biases."""
    clip: float = 10.0
    """Largest global gradient norm."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the base model and the activations. Default: float32 on CPU, bfloat16 on accelerators."""
    mesh: str = ""
    """Devices as data=N,model=M,expert=X. Default: as many devices on the data axis as divide the batch, or with
    --accumulate a part of it."""
    attention: Literal["xla", "splash"] | None = None
    """Attention implementation. Default: splash on TPU, else xla, since cuDNN cannot keep documents apart."""
    seed: int = 0
    """Seed of the data order, of random parameters and of dropout."""
    run_dir: Path | None = None
    """Directory of checkpoints and metrics. Default: in runs/, named after base, predictor and data, or pretrain."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one more at the end and at Ctrl-C."""
    keep: int = 2
    """How many of the newest checkpoints to keep; the best is kept besides."""
    eval_every: int = 100
    """Steps between validations, besides those at every checkpoint and at the end; 0: no others."""
    grace: int = 25
    """Seconds from SIGTERM or Ctrl-C to the end of the process. Where the step takes longer, the state before it is
    saved meanwhile."""
    log_every: int = 10
    """Steps between lines on a plain screen; metrics.jsonl has every step."""

    def __post_init__(self):
        super().__post_init__()
        settle_types(self)
        require_local(self)
        expand_home(self, "run_dir")
        require_positive(self, "steps", "length", "batch_size", "accumulate")
        require_positive(self, "checkpoint_every", "keep", "grace", "log_every")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed must be a number of 64 bits, got {self.seed}")
        if self.length == 1:
            raise ValueError(f"--length must be at least 2 tokens, got {self.length}")
        if self.eval_every < 0:
            raise ValueError(f"--eval-every must be 0 or more, got {self.eval_every}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup must be in [0, 1), got {self.warmup}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"--learning-rate must be above 0, got {self.learning_rate}")
        if self.learning_rate == math.inf:
            raise ValueError("--learning-rate must be finite, got inf")
        if not self.clip > 0:
            raise ValueError(f"--clip must be above 0, got {self.clip}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay must be 0 or more, got {self.weight_decay}")
        if self.batch_size % self.accumulate != 0:
            raise ValueError(f"--batch-size {self.batch_size} is not divisible by --accumulate {self.accumulate}")

    @property
    def part(self) -> int:
        """Rows of a batch whose gradients are computed at once."""
        return self.batch_size // self.accumulate

    @property
    def part_name(self) -> str:
        """What errors call `part`."""
        return "batch size" if self.accumulate == 1 else "batch size / --accumulate ="


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FitConfig):
    """Distil a token-importance predictor from a frozen base model."""

    base: str = "tiny"
    """A Hugging Face directory, a hub id, a .gguf file, or tiny (embedded)."""
    predictor: PredictorConfig = field(default=PredictorConfig())
    """The predictor to train."""
    objective: Literal["cross_entropy", "squared_error"] | None = None
    """Distillation loss. Default: squared_error for contextual, cross_entropy for the others. squared_error goes with
    the target attention."""
    selection: AlwaysReadConfig = field(default=AlwaysReadConfig())
    """Tokens that are read whatever their scores: the cross entropy leaves them out. Both 0 for the published loss."""
    chosen: int | float | str | None = None
    """A second stage: the cross entropy counts only the contested keys that the predictor's own scores choose under
    this budget, a fraction or a number of tokens (DeepSeek-V3.2, arXiv 2512.02556, trains its indexer so). Validations
    count all of them. Default: all contested keys."""
    start: str | None = None
    """A run, for its best checkpoint, or a saved predictor, with whose parameters the training starts. Default: those
    of `init_predictor`."""
    reach: int | None = None
    """Context in tokens that the predictor is trained for: the second part of every document of a batch is moved on by
    a random number of tokens (positional skip-wise training, arXiv 2309.10400). Validations are not. 0: that of
    --length. Default: the base's context, or the window where all its layers slide."""
    calibration: int = 4
    """Batches on which the lookahead predictor chooses its rotary pairs."""

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.predictor, PredictorConfig):
            raise ValueError(
                f"predictor must be a PredictorConfig, for instance PredictorConfig(kind='producer'), got "
                f"{self.predictor!r}"
            )
        if not isinstance(self.selection, AlwaysReadConfig):
            raise ValueError(f"selection must be an AlwaysReadConfig, with sinks and recent, got {self.selection!r}")
        always = AlwaysReadConfig(sinks=self.selection.sinks, recent=self.selection.recent)  # a budget does not count
        object.__setattr__(self, "selection", always)
        if self.predictor.target != "attention" and self.objective == "squared_error":
            raise ValueError(
                f"--target {self.predictor.target} is trained for by --objective cross_entropy, not by squared_error; "
                "give --target attention"
            )
        if self.chosen is not None:
            object.__setattr__(self, "chosen", parse_budget(self.chosen))
            SelectionConfig(budget=self.chosen, sinks=self.selection.sinks, recent=max(self.selection.recent, 1))
            if self.objective == "squared_error" or (self.objective is None and self.predictor.kind == "contextual"):
                raise ValueError("--chosen is about the cross entropy; give --objective cross_entropy, or leave it out")
            if self.attention not in (None, "xla"):
                raise ValueError(f"--chosen runs with --attention xla, not {self.attention}; leave one of them out")
        if self.reach and self.reach < self.length:
            raise ValueError(f"--reach must be 0, or at least --length {self.length}, got {self.reach}")
        require_positive(self, "calibration")
        sinks, recent = self.selection.sinks, self.selection.recent
        if sinks + recent >= self.length:
            raise ValueError(
                f"--sinks {sinks} and --recent {recent} leave nothing to choose in --length {self.length}; raise the "
                "length"
            )
