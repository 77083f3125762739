"""Settings of the recipe of `tiny`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from butler_jax.model import BaseConfig, RopeConfig
from butler_jax.storage import expand_home
from butler_jax.training import FitConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(FitConfig):
    """Train the embedded base model `tiny` from nothing: its tokenizer, its weights, its card."""

    data: str = "python_docs:0.25+coreference:0.4+coreference_short:0.35"
    """Training text, as --data of train."""
    steps: int = 1000
    """Optimiser steps in all."""
    length: int = 512
    """Tokens in a row; the last `long_steps` steps use the whole context instead."""
    long_steps: int = 60
    """Final steps at rows of the full context, with about as many tokens a step."""
    batch_size: int = 8
    """Rows a step, over all devices."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, of all parameters but norms and biases."""
    clip: float = 1.0
    """Largest global gradient norm."""
    checkpoint_every: int = 250
    """Steps between checkpoints; one more at the end and at Ctrl-C."""
    vocab_size: int = 2048
    """Entries of the byte-level BPE."""
    width: int = 128
    """Model width E."""
    hidden: int = 384
    """Hidden width I of the feed-forward block."""
    layers: int = 6
    """Layers L."""
    heads: int = 8
    """Query heads H."""
    kv_heads: int = 2
    """KV heads K."""
    head_dim: int = 32
    """Head dimension D."""
    context: int = 2048
    """Longest context in tokens."""
    out: Path | None = None
    """Directory for the finished model in Hugging Face layout. Default: RUN_DIR/model."""

    def __post_init__(self):
        super().__post_init__()
        expand_home(self, "out")
        self.base_config()  # refuses sizes that are none
        if self.long_steps and self.long_rows % self.accumulate:
            raise ValueError(
                f"the --long-steps have batches of {self.long_rows} rows of {self.context} tokens, which --accumulate "
                f"{self.accumulate} does not divide; give a larger --batch-size, or a smaller --accumulate"
            )
        if self.layers < 2 or 2 * self.head_dim > self.width:
            raise ValueError(
                f"the first two layers are begun with heads that copy, in two subspaces of the stream: --layers must "
                f"be at least 2 and --width at least twice --head-dim, got {self.layers}, {self.width} and "
                f"{self.head_dim}"
            )
        if self.length > self.context:
            raise ValueError(f"--length {self.length} is beyond --context {self.context}")
        if not (0 <= self.long_steps <= self.steps):
            raise ValueError(f"--long-steps must be in 0..{self.steps}, got {self.long_steps}")
        if self.vocab_size <= 256:
            raise ValueError(f"--vocab-size must be above 256 (the bytes), got {self.vocab_size}")

    @property
    def long_rows(self) -> int:
        """Rows of a batch of the whole context, with as many tokens as a batch of short rows."""
        return max(1, self.batch_size * self.length // self.context)

    def base_config(self) -> BaseConfig:
        """The Llama-family model these settings describe."""
        return BaseConfig(
            family="llama",
            vocab_size=self.vocab_size,
            width=self.width,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            context=self.context,
            norm_eps=1e-5,
            tied=True,
            rope=RopeConfig(theta=1e6),
        )
