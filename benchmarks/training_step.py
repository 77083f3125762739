"""A distillation step beside the base's own forward pass; compile time by depth; memory by length.

    python -m benchmarks.training_step --json benchmarks/training_step.json

Time: the steps of the three predictors and two forward passes (to logits, and to the last residual stream) take turns
in one process, so a busy machine slows all alike. Medians are reported. A step is forward pass, loss, gradients and
AdamW. Compile time is that of a step at two depths of a narrow base. Memory is the compiled temporary bytes of a step
at T and 2T, as XLA states them. The base has the shape of SmolLM2-135M and random weights unless --base names one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.losses import processor
from butler_jax.model import BaseConfig, BaseModel, dense_mixer, embed, logits, run_layers
from butler_jax.predictors import PREDICTORS, PredictorConfig, make_predictor
from butler_jax.runs import versions
from butler_jax.training import TrainConfig, start_state
from butler_jax.training.distillation import distil_step
from butler_jax.weights import load_base

LLAMA = dict(family="llama", context=8192)
SMOLLM2 = BaseConfig(
    vocab_size=49152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3, head_dim=64, tied=True, **LLAMA
)
NARROW = dict(vocab_size=256, width=64, hidden=128, heads=4, kv_heads=2, head_dim=16, **LLAMA)


def make_batch(vocab_size: int, batch_size: int, length: int) -> dict[str, jax.Array]:
    """Random tokens, one document a row."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch_size, length))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    arrays = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}
    return {name: jnp.asarray(a, jnp.int32) for name, a in arrays.items()}


def make_step(base: BaseConfig, kind: str, rank: int, stride: int) -> tuple[Any, Any]:
    """The jitted step of a predictor, and a function that makes its first state."""
    config = TrainConfig(predictor=PredictorConfig(kind=kind, rank=rank, stride=stride, target="attention"), steps=1000)
    step, optimiser = distil_step(config)
    return step, lambda: start_state(make_predictor(base, config.predictor), optimiser)


@partial(jax.jit, static_argnames="unembed")
def forward(model: BaseModel, batch: dict[str, jax.Array], unembed: bool) -> jax.Array:
    """The base alone: to logits (their maxima, so that all are computed), or to the last residual stream."""
    mixer = dense_mixer(model.config, batch["segments"])
    x, _, _ = run_layers(model, embed(model, batch["tokens"]), batch["positions"], mixer, None)
    return logits(model, x).max(-1) if unembed else x


def compiled_step(
    base: BaseConfig, kind: str, rank: int, stride: int, batch_size: int, length: int
) -> tuple[Any, float]:
    """A step compiled from shapes alone, and the seconds of tracing and compiling it."""
    step, first = make_step(base, kind, rank, stride)
    model = jax.eval_shape(lambda: BaseModel(base, jax.random.key(0)))
    batch = jax.eval_shape(lambda: make_batch(base.vocab_size, batch_size, length))
    state = jax.eval_shape(first)
    jax.clear_caches()
    began = time.perf_counter()
    compiled = step.lower(state, model, batch).compile()
    return compiled, time.perf_counter() - began


def measure_time(model: BaseModel, kinds: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Medians of seconds of the forward passes and of every predictor's step, taken in turns."""
    batch = make_batch(model.config.vocab_size, arguments.batch_size, arguments.length)
    steps, states = {}, {}
    for kind in kinds:
        steps[kind], first = make_step(model.config, kind, arguments.rank, arguments.stride)
        states[kind] = first()
    seconds: dict[str, list[float]] = {}
    for turn in range(arguments.repeats + 1):  # the first turn compiles
        for name in ("forward", "forward without unembedding", *kinds):
            began = time.perf_counter()
            if name in steps:
                states[name], metrics = steps[name](states[name], model, batch)
                jax.block_until_ready((states[name], metrics))
            else:
                jax.block_until_ready(forward(model, batch, name == "forward"))
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    full, layers_only = (np.median(seconds[n]) for n in ("forward", "forward without unembedding"))
    return [
        {
            "what": name,
            "seconds": float(np.median(times)),
            "fastest": min(times),
            "over_forward": float(np.median(times) / full),
            "over_forward_without_unembedding": float(np.median(times) / layers_only),
        }
        for name, times in seconds.items()
    ]


def measure_compile(kind: str, depths: list[int], arguments: argparse.Namespace) -> list[dict]:
    """Median seconds to trace and compile a step at each depth of a narrow base, the depths taking turns."""
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    for _ in range(arguments.compile_repeats):
        for depth in depths:
            base = BaseConfig(layers=depth, **NARROW)
            seconds[depth].append(compiled_step(base, kind, arguments.rank, arguments.stride, 1, 256)[1])
    first = float(np.median(seconds[depths[0]]))
    return [
        {"predictor": kind, "layers": d, "seconds": float(np.median(s)), "ratio": float(np.median(s)) / first}
        for d, s in seconds.items()
    ]


def measure_memory(base: BaseConfig, kind: str, arguments: argparse.Namespace) -> list[dict]:
    """Compiled temporary memory of a step at T and 2T."""
    rows = []
    for length in (arguments.length, 2 * arguments.length):
        compiled, _ = compiled_step(base, kind, arguments.rank, arguments.stride, arguments.batch_size, length)
        mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
        rows.append({"predictor": kind, "tokens": length, "temporary_mib": mib})
        rows[-1]["ratio"] = mib / rows[0]["temporary_mib"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--base", help="a base model, as --base of train (default: SmolLM2's shape, random weights)")
    parser.add_argument("--predictors", nargs="+", default=list(PREDICTORS), choices=list(PREDICTORS))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--depths", type=int, nargs=2, default=[2, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile-repeats", type=int, default=3)
    arguments = parser.parse_args()

    model = load_base(arguments.base).model if arguments.base else BaseModel(SMOLLM2, jax.random.key(0))
    report: dict[str, Any] = {"time": measure_time(model, arguments.predictors, arguments)}
    print(f"{'T = ' + str(arguments.length):28} {'ms':>9} {'/ forward':>10} {'/ without unembedding':>22}")
    for row in report["time"]:
        ratios = row["over_forward"], row["over_forward_without_unembedding"]
        print(f"{row['what']:28} {1e3 * row['seconds']:9.0f} {ratios[0]:10.2f} {ratios[1]:22.2f}", flush=True)

    report["compile"] = []
    print(f"\n{'compile a step':28} {'layers':>9} {'s':>10} {'ratio':>22}")
    for kind in arguments.predictors:
        for row in measure_compile(kind, arguments.depths, arguments):
            report["compile"].append(row)
            print(f"{kind:28} {row['layers']:9} {row['seconds']:10.2f} {row['ratio']:22.2f}", flush=True)

    report["memory"] = []
    print(f"\n{'temporary memory of a step':28} {'T':>9} {'MiB':>10} {'ratio':>22}")
    for kind in arguments.predictors:
        for row in measure_memory(model.config, kind, arguments):
            report["memory"].append(row)
            print(f"{kind:28} {row['tokens']:9} {row['temporary_mib']:10.1f} {row['ratio']:22.2f}", flush=True)

    report |= {
        "settings": {k: v for k, v in vars(arguments).items() if k != "json"},
        "device": f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load_average_at_end": os.getloadavg(),
        "versions": versions(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
