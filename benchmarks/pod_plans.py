"""The steps that pods.py compiles: models, chips, and the rows of the tables of docs/guides/scaling.md."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from benchmarks.pod_evaluations import PASSES
from benchmarks.tpu_decode import LLAMA_8B
from butler_jax.model import BaseConfig
from butler_jax.parallel.mesh import parse_mesh
from butler_jax.predictors import PredictorConfig

MODELS = {
    "llama-3.1-8b": LLAMA_8B,
    "llama-3.1-70b": dataclasses.replace(LLAMA_8B, width=8192, hidden=28672, layers=80, heads=64),
}


class Chip(NamedTuple):
    """Peak rates: bfloat16 operations, bytes of memory, and bytes sent over all links, each per second."""

    flops: float
    memory: float
    links: float


# cloud.google.com/tpu/docs/v5e, v5p and v6e, as of 2026: links are given there both ways together; half of it goes out.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 400e9 / 2),
    "v5p": Chip(459e12, 2765e9, 1200e9 / 2),
    "v6e": Chip(918e12, 1638e9, 800e9 / 2),
}
STEPS = ("train", "decode", *PASSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodPlan:
    """One step to compile. batch_size: 0 is one row for each chip of the data axis. layers: None is the model's.

    target: of the predictor; errors have an offset of "share" and no value channels.
    """

    model: str = "llama-3.1-8b"
    topology: str = "v5e:16x16"
    mesh: str = "data=256"
    step: str = "train"
    length: int = 4096
    batch_size: int = 0
    predictor: str = "lookahead"
    target: str = "centred"
    layers: int | None = None

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}; choose {', '.join(MODELS)}")
        if self.chip not in CHIPS:
            raise ValueError(f"unknown chip {self.chip!r}; choose {', '.join(CHIPS)}, as in v5e:16x16")
        if self.step not in STEPS:
            raise ValueError(f"--step is {', '.join(STEPS[:-1])} or {STEPS[-1]}, got {self.step!r}")
        rows = self.batch_size or parse_mesh(self.mesh)["data"]
        object.__setattr__(self, "batch_size", rows)

    @property
    def chip(self) -> str:
        """v5e, v5p or v6e."""
        return self.topology.partition(":")[0]

    @property
    def predictor_config(self) -> PredictorConfig:
        """The predictor's configuration, with the stride of the tables in docs/guides/scaling.md."""
        offset = "none" if self.target == "attention" else "share"
        return PredictorConfig(kind=self.predictor, stride=4, target=self.target, offset=offset, value_channels=0)

    @property
    def base(self) -> BaseConfig:
        """The model's configuration."""
        base = MODELS[self.model]
        return base if self.layers is None else dataclasses.replace(base, layers=self.layers)


def _plans(model: str, step: str, *rows: tuple) -> list[PodPlan]:
    """Plans from rows (topology, mesh, length) or (topology, mesh, length, batch_size)."""
    names = ("topology", "mesh", "length", "batch_size")
    return [PodPlan(model=model, step=step, target="attention", **dict(zip(names, row, strict=False))) for row in rows]


# What docs/guides/scaling.md shows.
TABLE = [
    *_plans(
        "llama-3.1-8b",
        "train",
        ("v5e:16x16", "data=256", 4096),
        ("v5e:16x16", "data=128,model=2", 4096),
        ("v5e:16x16", "data=32,model=8", 4096),
        ("v5p:4x4x4", "data=64", 4096),
        ("v6e:8x8", "data=64", 4096),
        ("v5p:2x2x1", "data=4", 131072),
        ("v5p:4x4x4", "data=64", 131072),
        ("v5p:4x4x4", "data=16,model=4", 131072),
        ("v6e:8x8", "data=64", 131072),
        ("v5e:16x16", "data=256", 131072),
        ("v5e:16x16", "data=128,model=2", 131072),
        ("v5e:16x16", "data=32,model=8", 131072),
    ),
    *_plans(
        "llama-3.1-70b",
        "train",
        ("v5e:16x16", "data=256", 4096),
        ("v5e:16x16", "data=128,model=2", 4096),
        ("v5p:4x4x4", "data=64", 4096),
        ("v6e:16x16", "data=128,model=2", 4096),
        ("v5p:4x4x4", "data=64", 131072),
        ("v5p:4x4x4", "data=16,model=4", 131072),
    ),
    *_plans(
        "llama-3.1-8b",
        "decode",
        ("v5e:2x4", "model=8", 32768, 8),
        ("v5e:16x16", "data=32,model=8", 32768, 256),
        ("v5p:4x4x4", "data=8,model=8", 131072, 128),
        ("v6e:8x8", "data=8,model=8", 131072, 64),
    ),
    *_plans(
        "llama-3.1-70b",
        "decode",
        ("v5e:2x4", "model=8", 32768, 8),
        ("v5e:16x16", "data=32,model=8", 32768, 256),
        ("v5p:2x2x2", "data=2,model=4", 131072, 8),
        ("v5p:4x4x4", "data=8,model=8", 131072, 128),
        ("v5p:4x4x4", "data=2,model=8,sequence=4", 131072, 2),
        ("v6e:8x8", "data=8,model=8", 131072, 64),
        ("v6e:8x16", "data=16,model=8", 131072, 64),
    ),
    *_plans("llama-3.1-70b", "simulate", ("v5p:4x4x4", "data=2,model=8,sequence=4", 131072, 2)),
    *_plans("llama-3.1-70b", "recall", ("v5p:4x4x4", "data=2,model=8,sequence=4", 131072, 2)),
    *_plans("llama-3.1-70b", "calibrate", ("v5p:4x4x4", "data=2,model=8,sequence=4", 131072, 2)),
]
