"""Commands as several real processes on the loopback address, in a place with a base, a text and their runs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests import tiny_runs

REPOSITORY = Path(__file__).parent.parent
STEPS, EVERY = 12, 2

SIGNALLED = """
import os, runpy, signal, sys, time
from pathlib import Path
from butler_jax.training import loop
number, step, waits = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
taken, place_batch = 0, loop.place_batch

def place_and_signal(batch, mesh):
    global taken
    taken += 1
    if taken == step:
        while not waits.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)
    return place_batch(batch, mesh)

loop.place_batch = place_and_signal
sys.argv = sys.argv[4:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script whose process gets a signal before a step of the loop, once a path exists."""


LEFT = """
import os, runpy, signal, sys, threading, time
from dataclasses import replace
from pathlib import Path
import jax
import jax.numpy as jnp
from butler_jax.training import distillation

number, held, metrics = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
real = distillation.fit

def fit(run, state):
    def step(state, model, batch):
        new, values = run.step(state, model, batch)
        count, ends = 60_000_000, new.step != held
        turn = lambda c: (c[0] + 1, jnp.sin(c[1]) + 1)
        _, number = jax.lax.while_loop(lambda c: (c[0] < count) | ~ends, turn, (0, values["loss"]))
        return new, {**values, "loss": values["loss"] + 0 * number}
    return real(replace(run, step=jax.jit(step, donate_argnums=0)), state)

def ask():
    while not (metrics.exists() and metrics.read_text().count("\\n") == held - 1):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(os.getpid(), number)

distillation.fit = fit
if number:
    threading.Thread(target=ask, daemon=True).start()
sys.argv = sys.argv[4:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a training whose step `held` never ends, while the others take a second or more; a process may get a signal."""


class Signal(NamedTuple):
    """A signal that a process sends to itself before its n-th step, when `waits` is there."""

    number: int
    step: int
    waits: Path


class Ended(NamedTuple):
    """How a process ended: its exit status, what it said, and the time."""

    status: int
    said: str
    at: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Place:
    """A base, a text and a directory of runs, and the commands on them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.files = tiny_runs.make_place(directory)
        # Nearly all of the time is compilation, and only the first of several processes has a cache.
        self.environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(directory / "cache")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.launches = 0

    def train(self, run: str, *more: object) -> list[str]:
        """The arguments of a training of 8 rows a step into that run directory."""
        given = {
            "base": self.files["base"],
            "data": f"text:{self.files['text']}",
            "data-dir": self.files["data_dir"],
            "run-dir": self.directory / run,
            "steps": STEPS,
            "checkpoint-every": EVERY,
            "keep": 2,
            "length": 32,
            "batch-size": 8,
            "rank": 4,
            "calibration": 1,
            "eval-every": 0,
        }
        return ["train.py", *(str(a) for name, value in given.items() for a in (f"--{name}", value)), *map(str, more)]

    def evaluate(self, run: str, *more: object) -> list[str]:
        """The arguments of an evaluation of that run."""
        given = ["--run", self.directory / run, "--text", self.files["text"], "--context", 64, "--tokens", 256]
        given += "--tasks perplexity --policies dense,oracle,tokenbutler --allocations per_head".split()
        given += ["--budgets", "3/4,1/2,1/4"]  # budgets share a program
        return ["eval.py", *map(str, given), *map(str, more)]

    def run(
        self,
        count: int,
        command: list[str],
        *,
        signals: dict[int, Signal] | None = None,
        more: dict[int, list[str]] | None = None,
        environments: dict[int, dict[str, str]] | None = None,
        program: str = SIGNALLED,
        frozen: int | None = None,
        seconds: float = 900,
    ) -> list[Ended]:
        """Run a command as so many processes until all have ended, or all but the frozen one.

        more: further arguments of single processes. program: what the processes with a signal run.
        """
        self.launches += 1
        address, running, ended = f"127.0.0.1:{free_port()}", {}, {}
        script, *arguments = command
        logs = [self.directory / f"launch{self.launches}.{index}" for index in range(count)]
        for index in range(count):
            line = [sys.executable, str(REPOSITORY / script), *arguments, *(more or {}).get(index, [])]
            if count > 1:
                line += ["--distributed", f"{address},{count},{index}", "--host-timeout", "20"]
            if signals and index in signals:
                line[1:1] = ["-c", program, *map(str, signals[index])]
            environment = {**os.environ, **self.environment, **(environments or {}).get(index, {})}
            with logs[index].open("w") as log:
                running[index] = subprocess.Popen(
                    line, env=environment, cwd=self.directory, stdout=log, stderr=subprocess.STDOUT
                )
        until = time.monotonic() + seconds
        try:
            while running.keys() - {frozen}:
                for index, process in list(running.items()):
                    if process.poll() is not None:
                        ended[index] = Ended(process.returncode, logs[index].read_text(), time.monotonic())
                        del running[index]
                said = "\n".join(f"== {i}\n{logs[i].read_text()[-2000:]}" for i in running)
                assert time.monotonic() < until, f"still running after {seconds} s: {said}"
                time.sleep(0.1)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        return [ended[index] for index in sorted(ended)]

    def finish(self, count: int, command: list[str], **options) -> list[Ended]:
        """`run`, where all have to succeed."""
        ended = self.run(count, command, **options)
        for index, one in enumerate(ended):
            assert one.status == 0, f"process {index} of {count}: {one.said[-4000:]}"
        return ended

    def losses(self, run: str) -> list[float]:
        """The losses of a run, step by step from the first."""
        rows = tiny_runs.rows(self.directory / run)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]

    def kept(self, run: str) -> list[int]:
        """Steps of the finished checkpoints of a run."""
        return sorted(int(p.name) for p in (self.directory / run / "checkpoints").iterdir() if p.name.isdigit())

    def copy(self, run: str, to: str, *, step: int | None = None) -> None:
        """Copy a run; up to a checkpoint, where one is named."""
        shutil.copytree(self.directory / run, self.directory / to)
        for other in self.kept(to) if step else ():
            if other != step:
                shutil.rmtree(self.directory / to / "checkpoints" / str(other))
