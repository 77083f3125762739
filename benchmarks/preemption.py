"""A notice of preemption to a real training: seconds from SIGTERM to the end of the process, and what was saved.

    python -m benchmarks.preemption --base smollm2 --batch-sizes 1 8 --json benchmarks/preemption.json

Every training has taken two steps when a signal is drawn for a moment of the third or fourth. A step of the first batch
size is shorter than the grace, one of the last is longer. Both have to end with status 0 and a saved state.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.about import about
from benchmarks.training_process import TrainingProcess
from butler_jax.training import FitConfig

GRACE = FitConfig().grace


def preempt(arguments: list[object], directory: Path, seed: int) -> dict[str, object]:
    """Start a training, send it SIGTERM in its third or fourth step, and say how it ended."""
    process = TrainingProcess(directory / "run", *arguments, cache=directory / "programs")
    process.until(lambda: process.rows() >= 1, pause=0.05)
    began = time.monotonic()
    process.until(lambda: process.rows() >= 2, pause=0.05)
    step = time.monotonic() - began
    time.sleep(random.Random(seed).uniform(0, 2) * step)
    asked = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    said = process.end().splitlines()
    seconds = time.monotonic() - asked
    saved = [int(path.name) for path in (directory / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    return {
        "seconds_of_a_step": round(step, 1),
        "seconds_to_the_end": round(seconds, 1),
        "grace": GRACE,
        "status": process.process.returncode,
        "steps_saved": max(saved, default=0),
        "steps_taken": process.rows(),
        "said": [line for line in said if line.startswith("stop")],
    }


def main() -> None:
    """Measure every batch size, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path)
    given, rows = parser.parse_args(), []
    for size in given.batch_sizes:
        with tempfile.TemporaryDirectory() as place:
            how = ["--base", given.base, "--length", given.length, "--batch-size", size, "--steps", 1000]
            rows.append({"length": given.length, "batch_size": size, **preempt(how, Path(place), size)})
        print(rows[-1], flush=True)
        if given.json:
            given.json.write_text(json.dumps(about("preemption") | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
