"""Kills survived: a training on the embedded base, killed twenty times and started again each time.

    python -m benchmarks.faults --json benchmarks/faults.json

Half of the kills are SIGKILL, half are SIGTERM, which the training answers with a save. The moments are drawn with a
seed: some while the process starts, some while it trains, some while it writes a checkpoint. What a SIGKILL left behind
tells what it hit. A SIGTERM has to end the process with status 0 within the grace, and with a save where a step was
taken. A checkpoint counts as saved once it has its name, and as lost where it is not whole or the next start goes on
from an earlier one. The end is compared with an undisturbed run: the predictor's parameters bit for bit, and the
numbers written down at every step. A kill ends a process; the machine and its disk stay up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.about import about
from benchmarks.training_process import TrainingProcess, starts
from butler_jax import load_base, load_predictor
from butler_jax.runs import checkpoints
from butler_jax.storage import read_lines
from butler_jax.training import FitConfig

STEPS, EVERY = 900, 30
PLAN = ("start",) * 5 + ("training",) * 7 + ("saving",) * 8
GRACE = FitConfig().grace


def kill_and_resume(
    launch: Callable[[], TrainingProcess],
    seed: int = 0,
    plan: Sequence[str] = PLAN,
    every: int = EVERY,
    asked: int = 0,
) -> dict[str, Any]:
    """Kill a run at the moments of `plan` in random order, starting it again each time, and let the last start end it.

    Counts the kills by what they hit and the checkpoints that they cost. `asked` of the kills are SIGTERM. Raises
    RuntimeError where a process ends by itself before its kill, or not as documented after it, or the last one with an
    error.
    """
    draw, plan, hit, lost, newest = random.Random(seed), list(plan), Counter(), set(), []
    asks = [True] * asked + [False] * (len(plan) - asked)
    draw.shuffle(plan)
    draw.shuffle(asks)
    saves, longest = 0, 0.0
    before = 0
    for wanted, ask in zip(plan, asks, strict=True):
        training = launch()
        if wanted == "start":
            if ask:
                training.until(training.catches)
            time.sleep(draw.uniform(0.1, 2.5))
        else:
            training.until_it_trains(before, draw.randint(1, 3 * every), saving=wanted == "saving")
            time.sleep(draw.choice([0, 0, 0, 0.002, 0.01]) if wanted == "saving" else 0)
        sent = time.monotonic()
        (training.process.terminate if ask else training.process.kill)()
        said = training.end()
        longest = max(longest, time.monotonic() - sent) if ask else longest
        if training.process.returncode != (0 if ask else -signal.SIGKILL):
            raise RuntimeError(f"it ended otherwise than it was killed: {said}")
        began = len(starts(training.run_dir)) > before
        hit[wanted if ask else "saving" if began and training.saving() else "training" if began else "start"] += 1
        before += began
        place = training.run_dir / "checkpoints"
        there = checkpoints.steps(place)
        if saved := re.search(r"stopped and saved at step (\d+)", said):
            saves += 1
            lost |= {int(saved[1])} - set(there)
        lost |= {step for step in there if checkpoints.damage(place / str(step))}
        newest.append((before, max(there, default=0)))
    last = launch()
    said = last.end()
    if last.process.returncode or "Traceback" in said:
        raise RuntimeError(f"the last start failed: {said}")
    records = starts(last.run_dir)
    lost |= {step for at, step in newest if records[at]["from"] < step}
    found = {"kills": len(plan), "during": dict(hit), "restarts": len(plan), "checkpoints_lost": len(lost)}
    if asked:
        found["sigterm"] = {"kills": asked, "saved": saves, "longest_seconds": round(longest, 1), "grace": GRACE}
    return found


def numbers(run_dir: Path) -> list[tuple]:
    """Step, loss and norm of the gradient of every line of metrics.jsonl."""
    rows = [json.loads(line) for _, line in read_lines(run_dir / "metrics.jsonl")]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)

        def launch(run: str) -> TrainingProcess:
            rows = ["--length", 64, "--batch-size", 2, "--calibration", 1, "--mesh", "data=1"]
            steps = ["--steps", STEPS, "--checkpoint-every", EVERY, "--eval-every", 0]
            return TrainingProcess(place / run, "--data-dir", place / "data", *rows, *steps, cache=place / "cache")

        straight = launch("straight")
        said = straight.end()
        if straight.process.returncode:
            raise RuntimeError(f"the undisturbed run failed: {said}")
        began = time.monotonic()
        counts = kill_and_resume(lambda: launch("killed"), arguments.seed, asked=len(PLAN) // 2)
        counts["seconds"] = round(time.monotonic() - began, 1)
        base = load_base("tiny")
        ends = [jax.tree.leaves(load_predictor(place / run, base, step=STEPS)) for run in ("killed", "straight")]
        same = [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*ends, strict=True)]
        counts["parameters_identical"] = all(same)
        counts["steps_identical"] = numbers(place / "killed") == numbers(place / "straight")
    print(json.dumps(counts))
    if arguments.json:
        settings = {"seed": arguments.seed, "base": "tiny", "steps": STEPS, "checkpoint_every": EVERY}
        device = f"{jax.default_backend()}, {os.cpu_count()} cores"
        report = {**about("faults"), **settings, "device": device, **counts}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
