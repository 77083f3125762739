"""Does anything grow? Decoding 100,000 tokens and training 5,000 steps, with live buffers, memory and compilations.

    python -m benchmarks.long_runs --stories DIR --json benchmarks/long_runs.json

Five runs, through the functions that users call, each in a process of its own (--only NAME runs one of them):

- train: `distil` on tiny, rows of 64 tokens, four a step, with checkpoints and validations every 250 steps
- decode: stories260K (DIR), eight rows of 500 tokens in caches of its 512, again and again
- decode_tiny: the embedded base with the predictor just trained, eight rows of 2,000 tokens in caches of its 2,048
- decode_one_cache: stories260K, whose context is raised for the purpose, one row, one cache of 16,384 tokens
- serve: stories260K, a queue in eight slots, prompts of 1 ... 300 tokens with 20 to 200 new ones each

A sample is taken at the same place each time. Speed is tokens or steps a second of processor time, which a busy machine
disturbs less than the clock. It is compared between the first and the last tenth of the samples, which are equal work
in all runs but the last, where the cache fills. "Start" is the second sample, when everything has been done once.
Resident memory is taken after the allocator has given back what it holds in reserve. The peak is the process's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any
from unittest import mock

import jax
import numpy as np

import butler_jax
from benchmarks.watch import Watch
from butler_jax.data import cut_windows
from butler_jax.decoding import SamplingConfig
from butler_jax.predictors import PredictorConfig
from butler_jax.runs import versions
from butler_jax.selection import SelectionConfig
from butler_jax.training import TrainConfig, init_predictor, loop


def train(place: pathlib.Path, steps: int = 5000, every: int = 250, **changes: Any) -> Watch:
    """Distil a predictor for tiny; a sample every so many steps, before a checkpoint and after it."""
    intervals = dict(checkpoint_every=every, eval_every=every, log_every=every)
    places = dict(run_dir=place / "run", data_dir=str(place / "data"))
    config = TrainConfig(steps=steps, length=64, batch_size=4, mesh="data=1", **intervals, **places, **changes)
    place_batch, taken = loop.place_batch, 0

    def watched(batch, mesh):  # called once a step
        nonlocal taken
        taken += 1
        if taken % every == 0:
            watch.note(taken)
        return place_batch(batch, mesh)

    with Watch() as watch, mock.patch.object(loop, "place_batch", watched):
        butler_jax.distil(butler_jax.load_base("tiny"), config)
    return watch


def decode(
    base: Any, predictor: Any, *, rows: int, new: int, turns: int, every: int, capacity: int, budget: float | int
) -> Watch:
    """Stream `turns` generations of `rows` rows; a sample every so many tokens."""
    done = 0
    with Watch() as watch:
        for turn in range(turns):
            pieces = butler_jax.generate_stream(
                base,
                [[1]] * rows,
                predictor=predictor,
                selection=SelectionConfig(budget=budget),
                max_new_tokens=new,
                stop=(),
                sampling=SamplingConfig(temperature=1.0),
                seed=turn * rows,
                capacity=capacity,
            )
            for _ in pieces:
                done += 1
                if done % every == 0:
                    watch.note(done)
    return watch


def serve(base: Any, predictor: Any, *, tokens: int, every: int, most: int, new: tuple[int, int]) -> Watch:
    """Serve ragged requests, of prompts up to `most` tokens, until there are so many tokens; a sample every so many."""
    rng, done = np.random.default_rng(0), 0

    def heard(_):
        nonlocal done
        done += 1
        if done % every == 0:
            watch.note(done)

    def requests():
        while done < tokens:
            prompt = rng.integers(3, base.config.vocab_size, rng.integers(1, most + 1)).tolist()
            yield butler_jax.Request(prompt, int(rng.integers(*new)), stop=(), stream=heard)

    few, room = SelectionConfig(budget=1 / 4), most + new[1]
    with Watch() as watch:
        for one in butler_jax.serve(base, requests(), capacity=room, predictor=predictor, selection=few):
            assert one.reason == "length", one
    return watch


def untrained(base: Any) -> Any:
    """A lookahead predictor at step 0, which costs what a trained one does."""
    drawn = SamplingConfig(temperature=1.0)
    tokens = butler_jax.generate(base, [[1]], max_new_tokens=128, sampling=drawn, stop=()).tokens[0]
    kind = PredictorConfig(rank=min(16, base.config.head_dim))
    return init_predictor(base, kind, batches=cut_windows(tokens, context=len(tokens)))


def run(name: str, place: pathlib.Path, stories: str) -> Watch:
    """One of the runs."""
    if name == "train":
        return train(place)
    if name == "decode_tiny":
        base = butler_jax.load_base("tiny")
        predictor = butler_jax.load_predictor(place / "run", base)
        return decode(base, predictor, rows=8, new=2000, turns=7, every=2000, capacity=2048, budget=1 / 8)
    base = butler_jax.load_base(stories)
    predictor = untrained(base)
    if name == "decode":
        return decode(base, predictor, rows=8, new=500, turns=25, every=2000, capacity=512, budget=1 / 4)
    if name == "serve":
        return serve(base, predictor, tokens=52_000, every=1000, most=300, new=(20, 200))
    base.model.config = dataclasses.replace(base.config, context=16384)
    return decode(base, predictor, rows=1, new=16000, turns=1, every=500, capacity=16384, budget=256)


RUNS = ("train", "decode", "decode_tiny", "decode_one_cache", "serve")


def line(name: str, s: dict[str, Any]) -> str:
    """What one run shows."""
    return (
        f"{name:17}{s['done']:8,d}  a second {s['a_second'][0]:7.1f} -> {s['a_second'][1]:7.1f}  live arrays "
        f"{s['live_arrays'][0]} -> {s['live_arrays'][1]}, {s['live_mib'][0]:.2f} -> {s['live_mib'][1]:.2f} MiB  "
        f"resident {s['resident_mib'][0]:.0f} -> {s['resident_mib'][1]:.0f} MiB, "
        f"peak {s['peak_mib'][0]:.0f} -> {s['peak_mib'][1]:.0f}  "
        f"compilations {s['compilations'][0]} -> {s['compilations'][1]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", default="../shared/data/stories260K", help="directory of stories260K")
    parser.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS))
    parser.add_argument("--place", type=pathlib.Path, help="directory of the training run (default: a temporary one)")
    parser.add_argument("--json", type=pathlib.Path, help="add the figures to this file, in place of the same runs'")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.place or pathlib.Path(temporary)
        if len(arguments.only) > 1:
            own = ["--stories", arguments.stories, "--place", str(place)]
            own += ["--json", str(arguments.json)] if arguments.json else []
            for name in arguments.only:
                subprocess.run([sys.executable, "-m", "benchmarks.long_runs", "--only", name, *own], check=True)
            return
        (name,) = arguments.only
        watch = run(name, place, arguments.stories)
    summary = watch.summary()
    print(line(name, summary), flush=True)
    if arguments.json:
        report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"runs": {}}
        report["runs"][name] = {"summary": summary, "samples": watch.columns()}
        report |= {"versions": versions(), "cores": os.cpu_count()}
        report["device"] = f"{jax.default_backend()} {jax.devices()[0].device_kind}"
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
