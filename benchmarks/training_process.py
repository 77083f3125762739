"""`python train.py` as a process of its own, watched through the files it writes, to be killed at chosen moments."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from butler_jax.runs.directory import read_records

REPOSITORY = Path(__file__).parent.parent
LONGEST = 1800  # seconds to wait for a process


def starts(run_dir: Path) -> list[dict]:
    """The records of run.json."""
    with contextlib.suppress(FileNotFoundError):
        return read_records(run_dir)
    return []


class TrainingProcess:
    """A training with these arguments, started at once; programs are kept in the directory `cache`."""

    def __init__(self, run_dir: Path, *arguments: object, cache: Path):
        self.run_dir = run_dir
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.process = subprocess.Popen(
            [sys.executable, REPOSITORY / "train.py", "--run-dir", run_dir, *map(str, arguments)],
            env={**os.environ, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.began = time.monotonic()

    def rows(self) -> int:
        """How many steps are written down."""
        with contextlib.suppress(FileNotFoundError):
            return (self.run_dir / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written (or was, when the process died)."""
        with contextlib.suppress(FileNotFoundError):
            return any("unfinished" in path.name for path in (self.run_dir / "checkpoints").iterdir())
        return False

    def until(self, condition: Callable[[], bool], pause: float = 0.0005) -> None:
        """Wait for it, and look every `pause` seconds.

        Raises RuntimeError where the process ends first, or after LONGEST seconds.
        """
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended first: {self.end()}")
            if time.monotonic() > self.began + LONGEST:
                raise RuntimeError(f"{LONGEST} s have gone by")
            time.sleep(pause)

    def until_it_trains(self, starts_before: int, rows: int, saving: bool = False) -> None:
        """Wait until this start has taken so many steps, and until it writes a checkpoint, or does not."""
        self.until(lambda: len(starts(self.run_dir)) > starts_before, pause=0.02)
        target = self.rows() + rows
        self.until(lambda: self.rows() >= target, pause=0.002)
        self.until(lambda: self.saving() == saving)

    def catches(self) -> bool:
        """Whether it has taken SIGTERM into its own hands, as it does before its long imports."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) & 1 << signal.SIGTERM - 1)

    def end(self) -> str:
        """What it said, after it ended."""
        return self.process.communicate(timeout=LONGEST)[0]
