"""The command `python -m pallas_kernels.bench --model CHIP`: the table of a chip that need not be there."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.bench.assumptions import Assumptions
from pallas_kernels.bench.cases import SHAPES, Case, count_tokens
from pallas_kernels.bench.chips import CHIPS
from pallas_kernels.bench.prediction import predict_rows, shortest_gain
from pallas_kernels.bench.table import write_json

DEFAULTS = {
    "shape": "llama8b",
    "dtype": "bfloat16",
    "unit": "1",
    "context": "4096,8192,16384,32768,65536,131072",
    "batch": "1,16",
    "interval": "1,8",
    "together": "2,1",
}
HEADER = (
    f"{'together':>8} {'context':>8} {'budget':>8} {'batch':>5} {'interval':>8} {'us':>9} {'dense us':>9} "
    f"{'speed-up':>8} {'cap':>6} {'share':>6} {'launches':>8}  us of each kernel"
)


def amount(text: str) -> float:
    """One finite number above 0. Raises ArgumentTypeError for others."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"give a number above 0, got {text!r}")
    return found


def read_assumption(text: str) -> tuple[str, float]:
    """A name and a figure from name=value. Raises ArgumentTypeError for other text."""
    name, _, value = text.partition("=")
    try:
        return name, amount(value)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"give name=value such as launch=1.5, got {text!r}") from None


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    kernels = ", ".join(f"{name} {1e6 * t:.1f}" for name, t in row["kernels"].items())
    return (
        f"{row['together']:>8} {row['context']:>8} {row['budget']:>8.4f} {row['batch']:>5} {row['interval']:>8} "
        f"{1e6 * row['seconds']:>9.1f} {1e6 * row['dense_seconds']:>9.1f} {row['speedup']:>8.2f} {row['cap']:>6.1f} "
        f"{row['share_of_cap']:>6.0%} {row['launches']:>8.4g}  {kernels}"
    )


def run_model(asked: argparse.Namespace) -> dict[str, Any]:
    """Print the table of a chip and the assumptions behind it, and return both; `asked` is of `benchmark.parser`."""
    chip, assumed = CHIPS[asked.model], Assumptions().replaced(dict(asked.assume))
    settings = dict(dtype=asked.dtype, unit=asked.unit, pooling=asked.pooling, int8=asked.int8)
    report: dict[str, Any] = dict(chip=chip.name, modelled=True, shape=asked.shape, **settings)
    print(f"{chip.name}, MODELLED, nothing was run: {asked.shape}, {', '.join(map(str, settings.values()))}\n{HEADER}")
    report |= dict(rows=[], assumptions=assumed.records())
    own = settings | dict(shape=SHAPES[asked.shape], dtype=jnp.dtype(asked.dtype))
    for together, batch, budget, context in itertools.product(asked.together, asked.batch, asked.budget, asked.context):
        tokens = count_tokens(budget, context)
        if tokens <= context:
            case = Case(context=context, batch=batch, tokens=tokens, together=together, **own)
            report["rows"] += predict_rows(case, chip, asked.interval, assumed)
            print(*map(line, report["rows"][-len(asked.interval) :]), sep="\n", flush=True)
    for which in itertools.product(asked.together, asked.batch, asked.interval):
        together, batch, interval = which
        rows = [r for r in report["rows"] if (r["together"], r["batch"], r["interval"]) == which]
        gain = shortest_gain(rows)
        told = f"faster than dense from {gain} tokens on" if gain else "not faster than dense at the longest context"
        print(f"batch {batch}, {together} layers together, a choice every {interval} steps: {told}")
    print("assumed (--assume name=value replaces one):", *assumed.lines(), sep="\n")
    write_json(asked.json, report)
    return report
