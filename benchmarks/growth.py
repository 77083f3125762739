"""How time and memory grow with the length of a text, from 1,024 to 32,768 tokens.

    python -m benchmarks.growth --base qwen.gguf --lengths 1024 2048 4096 8192 16384 32768 --json benchmarks/growth.json

One row of random tokens, a predictor of rank 16 at step 0, and these passes, each in a process of its own:

- forward: the base alone, to the last residual stream
- train: a training step of the predictor, as `butler-jax train` takes it by default
- simulate: a simulation of tokenbutler at 1/16, after a prompt of a quarter
- prefill: the prompt read in chunks, with the caches and importance keys
- decode dense, decode sparse: one token more after that prompt, by everything and by 1/16

Time is processor time, which a busy machine disturbs less than the clock, without compilation. A pass of less than
LONG seconds is repeated, and the median counts. Memory is the peak of the process beyond what it held before the pass;
that of decoding includes the prefill. YaRN extends a base to lengths beyond its context.

An exponent e says that doubling the length multiplies the cost by 2^e. Attention's own square lies between 1 and 2 in
all passes; over the forward pass of the same length, a pass should not grow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.about import about
from benchmarks.training_step import forward, make_batch
from benchmarks.watch import Compilations, memory_mib
from butler_jax.decoding import GREEDY, empty_memory, generation, make_plan
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import simulate
from butler_jax.training import TrainConfig, start_state
from butler_jax.training.distillation import distil_step
from butler_jax.weights import load_base

PASSES = ("forward", "train", "simulate", "prefill")
LONG = 20.0  # seconds of a pass that runs once
REPEATS = 3


def measure(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of processor and clock of a pass, and the peak of memory beyond what was held before, in MiB."""

    def once():
        began = time.process_time(), time.perf_counter()
        with Compilations() as compiling:
            jax.block_until_ready(call())
        return time.process_time() - began[0] - compiling.seconds, time.perf_counter() - began[1] - compiling.seconds

    before = memory_mib()[0]
    times = [once()]
    if times[0][1] < LONG:
        times = [once() for _ in range(REPEATS)]
    processor, clock = (statistics.median(column) for column in zip(*times, strict=True))
    return {"processor_seconds": processor, "seconds": clock, "peak_mib": memory_mib()[1] - before}


def run(name: str, base: Any, length: int, tokens: int) -> Iterable[dict[str, Any]]:
    """The figures of a pass at one length."""
    config = PredictorConfig(rank=min(16, base.config.head_dim))
    predictor = make_predictor(base.config, config)
    batch, few = make_batch(base.config.vocab_size, 1, length), SelectionConfig(budget=1 / 16)
    if name == "forward":
        yield {"pass": name, **measure(lambda: forward(base.model, batch, False))}
    elif name == "train":
        step, optimiser = distil_step(TrainConfig(predictor=config, steps=1000))
        state = [start_state(predictor, optimiser)]

        def train():
            state[0], metrics = step(state[0], base.model, batch)
            return state[0], metrics

        yield {"pass": name, **measure(train)}
    elif name == "simulate":
        prompts, policy = jnp.asarray([length // 4], jnp.int32), make_policy("tokenbutler")
        asked = np.zeros((1, length), bool)
        yield {
            "pass": name,
            **measure(lambda: simulate(base.model, batch, policy, few, predictor, prompts=prompts, wanted=asked)),
        }
    else:
        keys = generation.row_keys(0, 1)
        policy, capacity = make_policy("tokenbutler"), length + 4 * tokens

        def decoding(selection):
            plan = make_plan(base.config, capacity, selection, policy, predictor=predictor)
            return generation.Decoding(plan, capacity, generation.CHUNK, None)

        lengths, held = jnp.asarray([length], jnp.int32), []

        def prefill():
            held.clear()
            found = generation.read_prompts(base.model, predictor, batch["tokens"], lengths, how=decoding(few))
            held.append(generation.draw_first(*found, batch["tokens"], lengths, keys, GREEDY))
            return held

        yield {"pass": name, **measure(prefill)}
        for variant, selection in (("dense", None), ("sparse", few)):
            how, (made, kept) = decoding(selection), jax.tree.map(jnp.copy, held[0])
            memory = empty_memory(how.plan, base.config.layers, 1)
            kept = kept._replace(state=dataclasses.replace(kept.state, memory=memory))
            now = [made, kept]

            def decode(how=how, now=now):
                for _ in range(tokens):
                    now[:] = generation.advance(
                        base.model, predictor, now[0].token, keys, now[1], GREEDY, plan=how.plan
                    )
                return now[0].token

            found = measure(decode)
            found |= {which: found[which] / tokens for which in ("processor_seconds", "seconds")}
            yield {"pass": f"decode {variant}", **found}


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each pass the exponents of time and of memory, fitted to all its lengths and to the last two."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["pass"] for row in rows):
        own = sorted((row for row in rows if row["pass"] == name), key=lambda row: row["tokens"])
        if len(own) < 2:
            continue
        tokens, found[name] = np.log([row["tokens"] for row in own]), {}
        for which in ("processor_seconds", "peak_mib"):
            cost = np.log([max(row[which], 1e-6) for row in own])
            found[name][which] = float(np.polyfit(tokens, cost, 1)[0])
            found[name][f"{which}_of_the_last_two"] = float(np.polyfit(tokens[-2:], cost[-2:], 1)[0])
    return found


def write(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Write the figures, and the command of this process."""
    path.write_text(json.dumps(report | about("growth"), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="a base model, as --base of train")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 16)])
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded at a time")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="add the figures to this file")
    arguments = parser.parse_args()
    if len(arguments.lengths) > 1 or len(arguments.passes) > 1:
        own = ["--base", arguments.base, "--tokens", str(arguments.tokens), "--json", str(arguments.json)]
        for length in arguments.lengths:
            for name in arguments.passes:
                command = [sys.executable, "-m", "benchmarks.growth", "--lengths", str(length), "--passes", name, *own]
                subprocess.run(command, check=True)
        write(arguments.json, json.loads(arguments.json.read_text()))  # with the command that ran them all
        return
    (length,), (name,) = arguments.lengths, arguments.passes
    base = load_base(arguments.base, context=length + 4 * arguments.tokens)
    report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"rows": []}
    for found in run(name, base, length, arguments.tokens):
        row = {"base": base.name, "tokens": length, **{k: v if k == "pass" else round(v, 4) for k, v in found.items()}}
        print(
            f"{row['pass']:14}{length:7,d} tokens  {row['processor_seconds']:9.3f} s of processors"
            f"{row['seconds']:9.3f} s of the clock  {row['peak_mib']:8.0f} MiB more",
            flush=True,
        )
        same = ("base", "pass", "tokens")
        report["rows"] = [old for old in report["rows"] if any(old[k] != row[k] for k in same)] + [row]
    report["exponents"] = {
        base: exponents([row for row in report["rows"] if row["base"] == base])
        for base in dict.fromkeys(row["base"] for row in report["rows"])
    }
    write(arguments.json, report)


if __name__ == "__main__":
    main()
