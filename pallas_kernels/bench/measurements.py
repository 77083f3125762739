"""Timings of programs that take turns, the bandwidth of a copy, and the rows of one case."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.peers import flashinfer_seconds, peer_programs, torch_seconds
from pallas_kernels.bench.programs import layers_that_fit, make_inputs, sparse_programs

COPIED = 2**28  # bytes of the array whose copy measures the bandwidth


def take_turns(programs: dict[str, tuple[Any, tuple]], repeats: int) -> dict[str, float]:
    """Median seconds of every (program, arguments), after one call each that compiles it. They take turns, to share
    disturbances."""
    for program, arguments in programs.values():
        jax.block_until_ready(program(*arguments))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (program, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second that are read and written while an array is scaled in place."""
    program = jax.jit(lambda x: x * 1.0009765625, donate_argnums=0)
    x = program(jnp.ones(COPIED // 4, jnp.float32))
    times = []
    for _ in range(repeats):
        jax.block_until_ready(x)
        start = time.perf_counter()
        x = jax.block_until_ready(program(x))
        times.append(time.perf_counter() - start)
    return 2 * COPIED / statistics.median(times)


def measure_case(
    case: Case, intervals: tuple[int, ...], repeats: int, memory: float, bandwidth: float
) -> list[dict[str, Any]]:
    """Measure one case: a row for each interval."""
    layers = layers_that_fit(case, memory)
    given = make_inputs(case, layers)
    programs, chosen = sparse_programs(case, given)
    others, missing = peer_programs(case, given, chosen)
    timed = {name: value / layers for name, value in take_turns(programs | others, repeats).items()}
    first, again = timed.pop("predict"), timed.pop("reuse")
    if jax.default_backend() == "gpu":
        for name, measure in dict(torch_sdpa=torch_seconds, flashinfer=flashinfer_seconds).items():
            found = measure(case, layers, repeats)
            (missing if isinstance(found, str) else timed)[name] = found
    dense_name, dense = min(((n, t) for n, t in timed.items() if n != "masked"), key=lambda pair: pair[1])
    shared = dict(budget=case.tokens / case.context, dense_seconds=dense, dense_form=dense_name, peers=timed | missing)
    shared |= dict(predict_seconds=first, reuse_seconds=again, dense_bytes=case.dense_bytes, copy_gb_s=bandwidth / 1e9)
    shared |= dict(dense_gb_s=case.dense_bytes / dense / 1e9)
    shared |= dict(context=case.context, tokens=case.tokens, batch=case.batch, together=case.together)

    def row(interval):
        speeds, read = case.speeds(interval, dense, first, again), case.sparse_bytes(interval)
        rates = dict(predicted_bytes=read, gb_s=read / speeds["seconds"] / 1e9, model_cap=case.model_cap(interval))
        return shared | dict(interval=interval) | speeds | rates

    return [row(interval) for interval in intervals]
