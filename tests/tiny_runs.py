"""A random base of a few thousand parameters on disk, with a tokenizer and a text: what whole runs are tested on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel
from butler_jax.predictors.config import PredictorConfig
from butler_jax.text.tokenizer import train_bpe
from butler_jax.training.config import TrainConfig
from butler_jax.weights.export import save_model

WORDS = "the a river stone bird sings over under old green hill and then while quiet morning light falls".split()


def text(documents: int = 60, seed: int = 0) -> str:
    """Documents of random words, set apart as text files are."""
    rng = np.random.default_rng(seed)
    return "<|endoftext|>".join(" ".join(rng.choice(WORDS, 80)) + "." for _ in range(documents))


def make_base(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random Llama of 4 layers in Hugging Face layout, with a byte-level tokenizer; returns `directory`."""
    tokenizer = train_bpe([text()], 280)
    sizes = dict(width=64, hidden=96, layers=4, heads=8, kv_heads=2, head_dim=8, context=128, tied=True)
    config = BaseConfig(family="llama", vocab_size=tokenizer.vocab_size, norm_eps=1e-5, **{**sizes, **changes})
    save_model(directory, BaseModel(config, jax.random.key(seed)), tokenizer)
    return directory


def make_place(directory: Path) -> dict[str, Path]:
    """A base, a text and a directory for prepared data: {"base", "text", "data_dir"}."""
    (directory / "book.txt").write_text(text())
    return {"base": make_base(directory / "base"), "text": directory / "book.txt", "data_dir": directory / "data"}


def settings(place: dict[str, Path], run_dir: Path, **changes: Any) -> TrainConfig:
    """A short run in that place, with a small predictor."""
    given = dict(
        base=str(place["base"]),
        data=f"text:{place['text']}",
        data_dir=place["data_dir"],
        run_dir=run_dir,
        steps=8,
        length=32,
        batch_size=2,
        predictor=predictor_config(),
        calibration=1,
        checkpoint_every=100,
        eval_every=0,
        mesh="data=1",
    )
    return TrainConfig(**{**given, **changes})


def predictor_config(kind: str = "lookahead") -> PredictorConfig:
    """A predictor small enough for that base."""
    return PredictorConfig(kind=kind, rank=4, stride=2, hidden=16)


def rows(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def fill(place: Path, leave: int) -> Path:
    """Occupy a disk but for some bytes."""
    space = os.statvfs(place)
    (place / "ballast").write_bytes(bytes(max(space.f_bavail * space.f_frsize - leave, 0)))
    return place / "ballast"
