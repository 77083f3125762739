"""The second start of a program against the first: JAX's persistent compilation cache, empty and filled.

    python -m benchmarks.starts --run RUN --json benchmarks/starts.json

--run: a run of butler-jax train for tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.about import about

NOTEBOOK = """
import butler_jax

butler_jax.use_compilation_cache()
base = butler_jax.load_base("tiny")
predictor = butler_jax.load_predictor({run!r}, base)
selection = butler_jax.SelectionConfig(budget=1 / 8)
print(butler_jax.generate(base, "Return the", predictor=predictor, selection=selection, max_new_tokens=64).text)
"""
EVALUATION = (
    "--tasks perplexity --tokens 2048 --context 512 --budgets 1/8 --policies oracle,streaming,tokenbutler".split()
)


def programs(run: pathlib.Path) -> dict[str, list[str]]:
    """The commands that are timed, by what the table calls them."""
    command = [sys.executable, "-m", "butler_jax"]
    prompt = ["--prompt", "Return the", "--budget", "1/8", "--max-new-tokens", "64"]
    return {
        "generate": [*command, "generate", "--run", str(run), *prompt],
        "eval.py": [sys.executable, "eval.py", "--run", str(run), *EVALUATION],
        "cells of a notebook": [sys.executable, "-c", NOTEBOOK.format(run=str(run))],
    }


def measure(command: list[str], cache: pathlib.Path, place: pathlib.Path | None = None) -> dict[str, float]:
    """Wall seconds and seconds of computing of one start in a directory; the programs compiled go to `cache`."""
    hidden = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"BUTLER_COMPILATION_CACHE": str(cache), "PYTHONPATH": os.getcwd()}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        extra = ["--out", out] if "eval.py" in command else []  # a former evaluation would be gone on with
        subprocess.run([*command, *extra], env=environment, cwd=place, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    computing = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return {"seconds": round(wall, 2), "computing": round(computing, 2)}


def compare(name: str, command: list[str], repeats: int) -> dict[str, Any]:
    """The fastest of some first starts, and of the second starts after them."""
    starts: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for found in starts.values():
                found.append(measure(command, pathlib.Path(cache)))
            kept = [path.stat().st_size for path in pathlib.Path(cache).glob("*-cache")]
    best = {start: min(found, key=lambda one: one["seconds"]) for start, found in starts.items()}
    return {"program": name, **best, "programs_kept": len(kept), "bytes_kept": sum(kept)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=pathlib.Path, required=True, help="a run of butler-jax train for tiny")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of starts; the fastest of each count")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = []
    for name, command in programs(arguments.run).items():
        row = compare(name, command, arguments.repeats)
        rows.append(row)
        print(
            f"{name:<20} first {row['first']['seconds']:6.1f} s   second {row['second']['seconds']:6.1f} s   "
            f"{row['programs_kept']} programs, {row['bytes_kept'] / 1e6:.1f} MB",
            flush=True,
        )
    device = {"device": "cpu", "cores": os.cpu_count(), "load": [round(one, 2) for one in os.getloadavg()]}
    if arguments.json:
        text = json.dumps({"rows": rows, "options_of_eval": EVALUATION, **device, **about("starts")}, indent=2)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
