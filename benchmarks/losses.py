"""Time and memory of the distillation losses beside forms that build the T x T square.

    python -m benchmarks.losses --json benchmarks/losses.json

Every figure is one jitted call that returns the loss and the gradients of q_imp and k_imp. The cross entropy is over
the keys that are neither among the 4 sinks nor the 8 recent ones, and returns the attention output too. The two forms
take turns in one process, so a busy machine slows both alike. The median is reported, and compiled temporary memory as
XLA states it. The naive form is `jax.value_and_grad` of the formula as written. Float32, one row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.training.losses.cross_entropy import attend_with_cross_entropy
from butler_jax.training.losses.squared_error import sum_squared_errors

DIM, RANK = 64, 16
SINKS, RECENT = 4, 8
SECONDS = 60  # a form that takes longer than this for one call is timed once


def squares(q, k, q_imp, k_imp):
    """True logits and predicted scores [B, H, T, T], and the causal mask."""
    k, k_imp = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, k_imp))
    true = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = jnp.einsum("bihr,bjhr->bhij", q_imp, k_imp) * q_imp.shape[-1] ** -0.5
    return true, scores, jnp.tril(jnp.ones((1, 1, q.shape[1], q.shape[1]), bool))


def naive_squared_error(q, k, v, q_imp, k_imp):
    true, scores, seen = squares(q, k, q_imp, k_imp)
    return jnp.sum(jnp.square(jnp.where(seen, true - scores, 0))), ()


def naive_cross_entropy(q, k, v, q_imp, k_imp):
    true, scores, seen = squares(q, k, q_imp, k_imp)
    contested = jnp.tril(seen, -RECENT) & (jnp.arange(q.shape[1]) >= SINKS)[None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, true, -1e30), axis=-1)
    logarithms = jax.nn.log_softmax(jnp.where(contested, scores, -1e30), axis=-1)
    output = jnp.einsum("bhij,bjhd->bihd", weights, jnp.repeat(v, q.shape[2] // v.shape[2], axis=2))
    return -jnp.sum(weights * jnp.where(contested, logarithms, 0)), output


def squared_error(q, k, v, q_imp, k_imp):
    return sum_squared_errors(q, k, q_imp, k_imp)[0], ()


def cross_entropy(q, k, v, q_imp, k_imp):
    output, loss, _ = attend_with_cross_entropy(q, k, v, q_imp, k_imp, sinks=SINKS, recent=RECENT)
    return loss, output


LOSSES = {
    "squared error": (squared_error, naive_squared_error),
    "cross entropy": (cross_entropy, naive_cross_entropy),
}


def compile_form(function, arguments):
    """Compiled value and gradient, and its temporary memory in bytes."""
    compiled = jax.jit(jax.value_and_grad(function, (3, 4), has_aux=True)).lower(*arguments).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def seconds_of(compiled, arguments):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


def free_bytes() -> int:
    """Memory of the machine that is free now; 0 where the system does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def relative_difference(ours, naive) -> float:
    """Largest difference of the gradients relative to the largest entry."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(naive), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


def measure(name, length, heads, kv_heads, repeats):
    rng = np.random.default_rng(0)
    shapes = (heads, DIM), (kv_heads, DIM), (kv_heads, DIM), (heads, RANK), (kv_heads, RANK)
    arguments = [jnp.asarray(rng.normal(size=(1, length, *shape)), jnp.float32) for shape in shapes]
    (ours, our_bytes), (naive, naive_bytes) = (compile_form(form, arguments) for form in LOSSES[name])
    row = {"loss": name, "tokens": length, "heads": heads, "kv_heads": kv_heads}
    row |= {"temporary_mib": our_bytes / 2**20, "naive_temporary_mib": naive_bytes / 2**20}
    fits = naive_bytes < 0.5 * free_bytes() or not free_bytes()
    (_, our_gradients), times, naive_times = ours(*arguments), [], []
    if fits:
        start = time.perf_counter()
        row["gradient_difference"] = relative_difference(our_gradients, naive(*arguments)[1])
        repeats = repeats if time.perf_counter() - start < SECONDS / 6 else 3
        repeats = repeats if time.perf_counter() - start < SECONDS else 1
    for _ in range(repeats):
        times.append(seconds_of(ours, arguments))
        if fits:
            naive_times.append(seconds_of(naive, arguments))
    row |= {"repeats": repeats, "milliseconds": 1e3 * float(np.median(times))}
    if fits:
        row["naive_milliseconds"] = 1e3 * float(np.median(naive_times))
        row["speedup"] = row["naive_milliseconds"] / row["milliseconds"]
        row["speedup_of_minima"] = min(naive_times) / min(times)
    return row


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    rows = []
    print(f"{'loss':14} {'T':>6} {'ms':>9} {'naive ms':>9} {'ratio':>6} {'MiB':>8} {'naive MiB':>9}")
    for name in LOSSES:
        for length in arguments.tokens:
            row = measure(name, length, arguments.heads, arguments.kv_heads, arguments.repeats)
            rows.append(row)
            naive, ratio = row.get("naive_milliseconds", float("nan")), row.get("speedup", float("nan"))
            print(
                f"{name:14} {length:6} {row['milliseconds']:9.2f} {naive:9.1f} {ratio:6.1f}"
                f" {row['temporary_mib']:8.1f} {row['naive_temporary_mib']:9.1f}",
                flush=True,
            )
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load_average_at_end": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "dim": DIM,
        "rank": RANK,
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
