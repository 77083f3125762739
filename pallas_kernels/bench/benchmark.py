"""Speed of sparse decode attention compared with dense: a table, a JSON file and a plot.

    python -m pallas_kernels.bench --shape llama8b --context 32768,131072 --budget 1/16 --batch 1 --interval 1,8
    python -m pallas_kernels.bench --h200        # everything a GPU with 100 GB can show in 7 minutes
    python -m pallas_kernels.bench --model h200  # a model of the time on a chip that need not be there

A row measures the decode attention of one layer. `seconds` is the mean time of a step over an interval, in which one
step scores and chooses and the others attend to that choice again. `dense_seconds` is that of the fastest dense form on
the same inputs. `cap` is the speed-up if only bytes counted, and `share_of_cap` the part of it that was reached. A row
also has the predicted bytes, the rate at which they were read and that of a copy, the time of every peer, and the cap
of a step of the whole model (`model_cap`).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import sys
import time
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import checks
from pallas_kernels.bench.cases import SHAPES, Case, count_tokens
from pallas_kernels.bench.chips import CHIPS
from pallas_kernels.bench.measurements import copy_bandwidth, measure_case
from pallas_kernels.bench.modelled import DEFAULTS, amount, read_assumption, run_model
from pallas_kernels.bench.table import HEADER, line, peers_line, plot, write_json

H200 = {  # lists begin with what matters most
    "shape": "llama8b",
    "context": "32768,131072,8192,4096",
    "budget": "1/16,1/64,1/4",
    "batch": "16,1",
    "interval": "1,4,16",
    "minutes": 7.0,
    "memory": 45.0,
    "json": "benchmarks/h200/sparse_decode.json",
}


def numbers(text: str, least: int = 1) -> tuple[int, ...]:
    """Comma-separated whole numbers of at least `least`. Raises ArgumentTypeError for others."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"give whole numbers such as 4096,32768, got {text!r}") from None
    if min(found) < least:
        raise argparse.ArgumentTypeError(f"every number must be at least {least}, got {text!r}")
    return found


def count(text: str) -> int:
    """One whole number of at least 1. Raises ArgumentTypeError for others."""
    found = numbers(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"give one number, got {text!r}")
    return found[0]


def budgets(text: str) -> tuple[Fraction | int, ...]:
    """Comma-separated budgets: fractions of the context (1/16 or 0.0625) or numbers of tokens (2048).

    Raises:
        argparse.ArgumentTypeError: A part is neither.
    """
    found: list[Fraction | int] = []
    for part in text.split(","):
        try:
            value = Fraction(part)
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"give fractions or tokens such as 1/16,2048, got {part!r}") from None
        tokens = value.denominator == 1 and value > 1
        if value <= 0:
            raise argparse.ArgumentTypeError(f"a budget must be above 0, got {part!r}")
        if value > 1 and not tokens:
            raise argparse.ArgumentTypeError(f"a fraction is at most 1 and a number of tokens whole, got {part!r}")
        found.append(int(value) if tokens else value)
    return tuple(found)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    on_cpu = jax.default_backend() == "cpu"
    found = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--shape", choices=tuple(SHAPES), default="llama1b" if on_cpu else "llama8b", help="whose attention")
    add("--context", type=numbers, default=(32768,), help="tokens cached, comma-separated")
    add("--budget", type=budgets, default=(Fraction(1, 16),), help="fractions or tokens attended, comma-separated")
    add("--batch", type=numbers, default=(1,), help="rows, comma-separated")
    add("--interval", type=numbers, default=(1, 8), help="steps from one prediction to the next, comma-separated")
    add("--together", type=numbers, default=(1,), help="layers that choose in one go, as in a step, comma-separated")
    add("--dtype", choices=("float32", "bfloat16"), default="float32" if on_cpu else "bfloat16")
    add("--unit", type=int, default=16 if jax.default_backend() == "tpu" else 1, help="tokens a page; 1 chooses tokens")
    add("--pooling", choices=checks.POOLINGS, default="normalised", help="of the scores of a group of query heads")
    add("--int8", action="store_true", help="k_imp in int8")
    add("--implementation", choices=checks.IMPLEMENTATIONS, default=None, help="default: the platform's own")
    add("--repeats", type=count, default=9, help="timings, of which the median counts")
    add("--memory", type=amount, default=8.0, help="GB that inputs may take")
    add("--minutes", type=amount, default=None, help="stop in time to end within so many minutes")
    add("--json", type=Path, default=None, help="where the rows go; the plot goes beside them")
    add("--h200", action="store_true", help="a check and the whole table of an H200, into benchmarks/h200/")
    add("--model", choices=tuple(CHIPS), default=None, help="print a model of this chip, which need not be there")
    add("--assume", type=read_assumption, action="append", default=[], help="a figure of the model, name=value")
    return found


def check_kernels(implementation: str) -> None:
    """Raise AssertionError unless the kernels agree with the reference on this device, uninterpreted."""
    unit = 16 if implementation == "tpu" else 1
    rng = np.random.default_rng(0)

    def normal(*size):
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    q, k, v = normal(2, 8, 128), normal(2, 2, 1024, 128), normal(2, 2, 1024, 128)
    q_imp, keys, lengths = normal(2, 2, 4, 16), normal(2, 2, 16, 1024), jnp.array([1024, 777])
    for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 3e-2)):  # of results of size 1
        own = [a.astype(dtype) for a in (q, k, v)]
        scores = [pk.importance_scores(q_imp, keys, lengths, implementation=i) for i in ("reference", implementation)]
        np.testing.assert_allclose(*scores, atol=1e-4)
        options = dict(n=128 // unit, unit=unit, sinks=4, recent=8)
        chosen = [
            pk.select_top_k(scores[0], lengths, implementation=i, **options) for i in ("reference", implementation)
        ]
        np.testing.assert_array_equal(chosen[0].indices, chosen[1].indices)
        outs = [
            pk.masked_topk_decode_attention(*own, *chosen[0], unit=unit, lengths=lengths, implementation=i)
            for i in ("reference", implementation)
        ]
        np.testing.assert_allclose(*(np.asarray(out, np.float32) for out in outs), atol=tolerance)
    for size in (1024, 65536):  # whole numbers, whose products are exact, so that every choice is the same
        q_imp, keys = jnp.round(4 * normal(2, 2, 4, 16)), jnp.round(4 * normal(2, 2, 16, size))
        k, v, lengths = normal(2, 2, size, 128), normal(2, 2, size, 128), jnp.array([size, size * 3 // 4])
        options = dict(n=128 // unit, unit=unit, sinks=4, recent=8, pooling="maximum", return_selection=True)
        results = [
            pk.sparse_decode_attention(q, k, v, q_imp, keys, lengths, implementation=i, **options)
            for i in ("reference", implementation)
        ]
        np.testing.assert_array_equal(*(chosen.indices for _, chosen in results))
        np.testing.assert_allclose(*(out for out, _ in results), atol=1e-4)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    command = parser()
    if arguments is None:
        arguments = sys.argv[1:]
    if "--h200" in arguments:
        flags = [f"--{name}={value}" for name, value in H200.items()]
        arguments = flags + [a for a in arguments if a != "--h200"]  # options given by hand come last and win
        if jax.default_backend() != "gpu":
            command.error(
                f"--h200 needs a GPU, the platform is {jax.default_backend()}; leave it out to measure this one"
            )
        check_kernels("gpu")
        print("the kernels agree with the reference on this GPU", flush=True)
    asked = command.parse_args(arguments)
    try:
        checks.check_unit(asked.unit)
        name = None if asked.model else checks.choose_implementation(asked.implementation, None)
    except ValueError as error:
        command.error(str(error))
    if asked.json and asked.json.suffix == ".png":
        command.error(f"--json {asked.json} is the name of a picture; the plot is written beside the rows, as .png")
    if asked.model:
        measuring = [
            f"--{name}" for name in ("implementation", "repeats", "memory", "minutes") if _given(name, arguments)
        ]
        if measuring:
            command.error(f"{', '.join(measuring)} is about measurements, and --model computes; leave it out")
        asked = command.parse_args([*(f"--{name}={value}" for name, value in DEFAULTS.items()), *arguments])
        try:
            run_model(asked)
        except ValueError as error:
            command.error(str(error))
        return 0
    device = jax.devices()[0]
    begun = time.monotonic()
    bandwidth = copy_bandwidth(asked.repeats)
    settings = dict(shape=asked.shape, dtype=asked.dtype, unit=asked.unit, pooling=asked.pooling, int8=asked.int8)
    machine = dict(device=device.device_kind, platform=device.platform, jax=jax.__version__)
    machine |= dict(processor=platform.processor() or platform.machine(), date=datetime.date.today().isoformat())
    report = machine | settings | dict(implementation=name, repeats=asked.repeats, copy_gb_s=bandwidth / 1e9)
    report |= dict(rows=[], left_out=[])
    setting = f"{asked.shape}, {asked.dtype}, unit {asked.unit}, {asked.pooling} pooling, {name}"
    print(f"{report['device']}, jax {jax.__version__}, {setting}; a copy moves {bandwidth / 1e9:.1f} GB/s")
    print(HEADER, flush=True)
    longest = 0.0
    sizes_asked = itertools.product(asked.context, asked.batch, asked.budget, asked.together)
    for context, batch, budget, together in sizes_asked:
        tokens = count_tokens(budget, context)
        sizes = dict(context=context, batch=batch, tokens=tokens, together=together)
        own = settings | dict(shape=SHAPES[asked.shape], dtype=jnp.dtype(asked.dtype))
        case = Case(**sizes, **own, implementation=asked.implementation)
        if why := unfit(case, asked.memory, begun, longest, asked.minutes):
            report["left_out"].append(sizes | dict(why=why))
            print(f"{together:>8} {context:>8} {tokens / context:>8.4f} {batch:>5} left out: {why}", flush=True)
            write_json(asked.json, report)
            continue
        start = time.monotonic()
        found = measure_case(case, asked.interval, asked.repeats, asked.memory * 1e9, bandwidth)
        report["rows"].extend(found)
        longest = max(longest, time.monotonic() - start)
        print(*map(line, found), peers_line(found[-1]), sep="\n", flush=True)
        write_json(asked.json, report)
    if asked.json and report["rows"]:
        print(f"rows: {asked.json}\n{plot(report, asked.json.with_suffix('.png'))}")
    return 0


def _given(name: str, arguments: list[str]) -> bool:
    """Whether an option is on the command line."""
    return any(argument.partition("=")[0] == f"--{name}" for argument in arguments)


def unfit(case: Case, memory: float, begun: float, longest: float, minutes: float | None) -> str | None:
    """The reason why a case cannot run, or None."""
    if case.tokens > case.context:
        return f"{case.tokens} tokens are more than the context of {case.context}"
    needed = case.together * case.dense_bytes
    if 1.2 * needed > memory * 1e9:
        return f"its caches take {needed / 1e9:.3g} GB, more than --memory allows"
    if minutes is not None and time.monotonic() - begun + 1.5 * longest > 60 * minutes:
        return f"no time left of {minutes} minutes"
    return None
