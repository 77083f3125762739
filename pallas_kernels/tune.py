"""Find the tiles of the GPU kernels that are fastest on the chip at hand.

    python -m pallas_kernels.tune                     # prints what it tries, and writes the table of tiles
    python -m pallas_kernels.tune --minutes 2 --dry   # does not write

One setting after the other is changed, and kept where the operation is faster on the geometric mean over several
batches and lengths. A timing is the median of several runs through a stack of layers, each of whose steps needs the one
before. The caches of the layers are larger than the chip's own cache.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import api
from pallas_kernels.gpu.tiles import Tiles, current_tiles, try_tiles, write_tiles

CASES = ((1, 32768), (1, 131072), (16, 8192), (16, 32768))  # batch, tokens
TRIALS: dict[str, tuple[int, ...]] = {
    "attend_bytes": (4096, 8192, 32768),
    "attend_stages": (1, 3, 4, 5),
    "attend_warps": (2, 8),
    "programs": (264, 1056, 2112),
    "least_tokens": (32, 64, 256),
    "score_tokens": (128, 256, 1024, 2048),
    "score_warps": (2, 8),
    "held": (8192, 16384),
    "candidates": (8192,),
    "select_warps": (8, 16),
    "written": (2048, 8192),
    "choosers": (66, 264),
}
LAYERS = 6
GAIN = 0.99  # a change is kept if the time is less than this share


class TimedCall(NamedTuple):
    """One operation to time: its arrays by name, and how many units it reads."""

    arrays: dict[str, Any]
    n: int


def make_case(batch: int, size: int, *, heads=8, group=4, dim=128, rank=16, budget=16) -> TimedCall:
    """Random bfloat16 caches of several layers, of the shape of Llama-3.1-8B."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    arrays = dict(
        q=normal(batch, heads * group, dim),
        k=normal(LAYERS, batch, heads, size, dim),
        v=normal(LAYERS, batch, heads, size, dim),
        q_imp=normal(batch, heads, group, rank),
        k_imp=normal(LAYERS, batch, heads, rank, size),
        new_k=normal(batch, heads, dim),
        new_v=normal(batch, heads, dim),
        lengths=jnp.full((batch,), size, jnp.int32),
    )
    return TimedCall(arrays, size // budget)


def lower_step(case: TimedCall, tiles: Tiles, pooling: str):
    """The operation through all layers, one after the other, traced with these tiles."""

    def step(q, q_imp, **arrays):
        for layer in range(LAYERS):
            how = dict(n=case.n, sinks=4, recent=8, pooling=pooling, layer=layer, implementation="gpu")
            out = api.sparse_decode_attention(q, q_imp=q_imp, **arrays, **how)
            q = q + out.astype(q.dtype)
            q_imp = q_imp + out.astype(q.dtype).reshape(*q_imp.shape[:3], -1)[..., : q_imp.shape[-1]]
        return q

    jax.clear_caches()  # traces with other tiles
    with try_tiles(tiles):
        return jax.jit(step).lower(**case.arrays)


def time_step(compiled, case: TimedCall, repeats: int = 7, calls: int = 4) -> float:
    """Seconds of one layer, the median of several timings."""
    compiled(**case.arrays).block_until_ready()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(**case.arrays)
        out.block_until_ready()
        found.append((time.perf_counter() - start) / calls / LAYERS)
    return float(np.median(found))


def search(minutes: float, pooling: str, say=print) -> tuple[Tiles, dict]:
    """The best tiles found in the time given, and the seconds of every case before and after."""
    end = time.monotonic() + 60 * minutes
    cases = [make_case(*case) for case in CASES]
    best = current_tiles()

    def times(trials: list[Tiles]) -> list[list[float] | None]:
        """Seconds of every case with each of the tiles; None where they do not compile."""
        lowered = [[lower_step(case, tiles, pooling) for case in cases] for tiles in trials]

        def compile_all(steps):
            try:
                return [step.compile() for step in steps]
            except jax.errors.JaxRuntimeError:  # more registers or shared memory than the chip has
                return None

        with ThreadPoolExecutor(8) as pool:
            programs = list(pool.map(compile_all, lowered))
        return [p and [time_step(step, case) for step, case in zip(p, cases, strict=True)] for p in programs]

    (first,) = times([best])
    now = first
    say(f"{_micro(now)}  before")
    for name, values in TRIALS.items():
        if time.monotonic() > end:
            say(f"no time is left for {name} and what follows it")
            break
        trials = [replace(best, **{name: value}) for value in values if value != getattr(best, name)]
        for tiles, found in zip(trials, times(trials), strict=True):
            better = found is not None and _mean(found) < GAIN * _mean(now)
            told = _micro(found) if found else "does not compile"
            say(f"{told}  {name} {getattr(tiles, name)}{'  kept' if better else ''}")
            if better:
                best, now = tiles, found
    return best, {"cases": CASES, "before_us": _micros(first), "after_us": _micros(now)}


def _mean(times):
    return math.exp(sum(map(math.log, times)) / len(times))


def _micros(times):
    return [round(1e6 * t, 1) for t in times]


def _micro(times):
    return " ".join(f"{t:8.1f}" for t in _micros(times)) + " us"


def main(arguments: list[str] | None = None) -> int:
    """Run the tuner; returns the exit status."""
    command = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__.splitlines()[0])
    command.add_argument("--minutes", type=float, default=5.0, help="begin no new setting after so many minutes")
    command.add_argument("--pooling", default="maximum", help="of the scores of a group of query heads")
    command.add_argument("--dry", action="store_true", help="do not write the table")
    asked = command.parse_args(arguments)
    device = jax.devices()[0]
    if device.platform != "gpu":
        command.error(f"it times kernels on a GPU, the platform is {device.platform}; run it on the chip to tune for")
    print(f"{device.device_kind}, jax {jax.__version__}; microseconds a layer: {CASES} (batch, tokens)")
    best, measured = search(asked.minutes, asked.pooling, lambda line: print(line, flush=True))
    print(best)
    if not asked.dry:
        about = dict(date=datetime.date.today().isoformat(), jax=jax.__version__, pooling=asked.pooling, **measured)
        write_tiles(device.device_kind, best, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
