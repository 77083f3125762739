"""Find the tiles of the GPU kernels that are fastest on the chip at hand.

    python -m pallas_kernels.tune                     # prints what it tries, and writes the table of tiles
    python -m pallas_kernels.tune --minutes 2 --dry   # does not write
    python -m pallas_kernels.tune --model a100        # by a model, for a chip that is not here

One setting after the other is changed, and kept where the operation is faster on the geometric mean over several
batches and lengths. The timed programs and their inputs are those of `pallas_kernels.bench`: they attend to several
layers in turn, and the time of a layer is the median of several runs.

The model knows the grids of the kernels, and their code with the default tiles. So it can tell how many programs share
a row, and nothing about blocks, warps and stages. What it finds is marked as modelled in the table, and gives way to
what is measured. A change is kept if it takes less than MODELLED_GAIN of the time: the model cannot tell a few per
cent.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.cases import SHAPES, Case
from pallas_kernels.bench.chips import CHIPS, GpuChip
from pallas_kernels.bench.measurements import take_turns
from pallas_kernels.bench.prediction import kernels_seconds
from pallas_kernels.bench.programs import make_inputs, predict_program
from pallas_kernels.bench.table import write_json
from pallas_kernels.checks import POOLINGS
from pallas_kernels.gpu.tiles import TRIALS, Tiles, current_tiles, is_measured, try_tiles, write_tiles

CASES = ((1, 32768), (1, 131072), (16, 8192), (16, 32768))  # batch, tokens
LAYERS = 6
REPEATS = 15
GAIN = 0.99  # a change is kept if the time is less than this share
MODELLED_GAIN = 0.95


def search(minutes: float, pooling: str, say=print) -> tuple[Tiles, dict]:
    """The best tiles found in the time given, and the seconds of every case before and after."""
    end = time.monotonic() + 60 * minutes
    shared = dict(shape=SHAPES["llama8b"], dtype=jnp.dtype(jnp.bfloat16), pooling=pooling, implementation="gpu")
    cases = [Case(context=size, batch=batch, tokens=size // 16, **shared) for batch, size in CASES]
    inputs = [make_inputs(case, LAYERS) for case in cases]
    best = current_tiles()

    def lower_all(tiles: Tiles) -> list[tuple[Any, tuple]]:
        """The program of every case traced with these tiles, and its arguments."""
        with try_tiles(tiles):
            programs = [predict_program(case, given) for case, given in zip(cases, inputs, strict=True)]
            return [(program.lower(*arguments), arguments) for program, arguments in programs]

    def compile_all(lowered):
        try:
            return [(program.compile(), arguments) for program, arguments in lowered]
        except jax.errors.JaxRuntimeError:  # more registers or shared memory than the chip has
            return None

    def time_all(compiled):
        for program, arguments in compiled:
            jax.block_until_ready(program(*arguments))
        return [t / LAYERS for t in take_turns(dict(enumerate(compiled)), REPEATS).values()]

    def times(trials: list[Tiles]) -> list[list[float] | None]:
        """Seconds of a layer of every case with each of the tiles; None where they do not compile."""
        lowered = [lower_all(tiles) for tiles in trials]
        with ThreadPoolExecutor(8) as pool:
            programs = list(pool.map(compile_all, lowered))
        return [compiled and time_all(compiled) for compiled in programs]

    (first,) = times([best])
    if first is None:
        raise ValueError("the present tiles need more registers or shared memory than this GPU has; remove its entry")
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


def search_model(chip: GpuChip, pooling: str, say=print) -> tuple[Tiles, dict]:
    """The grids that the model finds best for a chip, and the seconds of every case before and after."""
    shared = dict(shape=SHAPES["llama8b"], dtype=jnp.dtype(jnp.bfloat16), pooling=pooling)
    cases = [Case(context=size, batch=batch, tokens=size // 16, **shared) for batch, size in CASES]

    def times(tiles):
        return [sum(kernels_seconds(case, chip, tiles=tiles).values()) for case in cases]

    best, many = Tiles(), chip.multiprocessors
    first = now = times(best)
    say(f"{_micro(now)}  before")
    trials = dict(choosers=(many // 2, many, 2 * many), programs=(2 * many, 4 * many, 8 * many), least_tokens=(32, 64))
    for name, values in trials.items():
        tried = [replace(best, **{name: value}) for value in values if value != getattr(best, name)]
        found = {tiles: times(tiles) for tiles in tried}
        fastest = min(tried, key=lambda tiles, found=found: _mean(found[tiles]))
        better = _mean(found[fastest]) < MODELLED_GAIN * _mean(now)
        for tiles in tried:
            kept = "  kept" if better and tiles == fastest else ""
            say(f"{_micro(found[tiles])}  {name} {getattr(tiles, name)}{kept}")
        best, now = (fastest, found[fastest]) if better else (best, now)
    return best, {"modelled": True, "cases": CASES, "before_us": _micros(first), "after_us": _micros(now)}


def _mean(times):
    return math.exp(sum(map(math.log, times)) / len(times))


def _micros(times):
    return [round(1e6 * t, 1) for t in times]


def _micro(times):
    return " ".join(f"{t:8.1f}" for t in _micros(times)) + " us"


def write_found(path: Path | None, chip: str, tiles: Tiles, about: dict) -> None:
    """Write tiles and what is known of them to a file of their own, if there is a path."""
    write_json(path, {"chip": chip, **about, "tiles": asdict(tiles)})


def main(arguments: list[str] | None = None) -> int:
    """Run the tuner; returns the exit status."""
    command = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__.splitlines()[0])
    command.add_argument("--minutes", type=float, default=5.0, help="begin no new setting after so many minutes")
    command.add_argument(
        "--pooling", choices=POOLINGS, default="maximum", help="of the scores of a group of query heads"
    )
    command.add_argument("--dry", action="store_true", help="do not write the table")
    command.add_argument("--json", type=Path, help="write what was found here too")
    command.add_argument("--model", choices=tuple(CHIPS), help="by the model of this chip, which need not be there")
    asked = command.parse_args(arguments)
    today = dict(date=datetime.date.today().isoformat(), jax=jax.__version__, pooling=asked.pooling)
    if asked.model:
        chip = CHIPS[asked.model]
        print(f"{chip.name}, MODELLED; microseconds a layer: {CASES} (batch, tokens)")
        best, modelled = search_model(chip, asked.pooling)
        print(best)
        write_found(asked.json, chip.name, best, today | modelled)
        if best == Tiles():
            print("the model prefers no other grid to the defaults: nothing to write")
        elif is_measured(chip.name):
            print(f"the table has tiles that were measured on {chip.name}: they stay")
        elif not asked.dry:
            write_tiles(chip.name, best, today | modelled)
        return 0
    device = jax.devices()[0]
    if device.platform != "gpu":
        command.error(f"it times kernels on a GPU, the platform is {device.platform}; run it on the chip to tune for")
    print(f"{device.device_kind}, jax {jax.__version__}; microseconds a layer: {CASES} (batch, tokens)")
    try:
        best, measured = search(asked.minutes, asked.pooling, lambda line: print(line, flush=True))
    except ValueError as error:
        command.error(str(error))
    print(best)
    write_found(asked.json, device.device_kind, best, today | measured)
    if not asked.dry:
        write_tiles(device.device_kind, best, today | measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
