"""The metrics of a run: metrics.jsonl with one object a step, TensorBoard where it is installed, and the screen.

A terminal shows a progress bar; elsewhere the screen gets a plain line every `log_every` steps. The first process
writes for all.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from butler_jax.storage import number, parse_object, read_lines, sync, write_whole, writing
from butler_jax.training.config import FitConfig

SILENT = 30.0  # seconds after which a step has a line of its own


class Metrics:
    """Where the metrics of a run go. Rows of steps after `start`, which will be done again, are removed."""

    def __init__(self, run_dir: Path, config: FitConfig, start: int):
        self.main = jax.process_index() == 0
        self.config = config
        self.console = Console()
        self.path = run_dir / "metrics.jsonl"
        self.board = self.bar = None
        self.start, self.began = start, time.monotonic()
        self.shown = self.began
        if self.main:
            if self.path.exists():
                kept = [line for _, line in read_lines(self.path) if _step_of(line) <= start]
                write_whole(self.path, b"".join(kept))
            self._open()
            self.board = _open_board(run_dir / "tensorboard", start)
            if self.console.is_terminal:
                self.bar = _progress_bar(self.console)
                self.task = self.bar.add_task("training", total=config.steps, completed=start, rate="")
                self.bar.start()

    def _open(self) -> None:
        with writing(self.path):
            self.file = self.path.open("a")

    def say(self, text: str) -> None:
        """Print a line on the screen of the first process."""
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(self, row: dict[str, Any]) -> None:
        """Record one step; row: its number as `step`, and its metrics."""
        if not self.main:
            return
        with writing(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.board:
            self.board.write(row)
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        step, steps = row["step"], self.config.steps
        rate = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=step, rate=rate)
        elif step % self.config.log_every == 0 or step == steps or time.monotonic() - self.shown > SILENT:
            self.shown = time.monotonic()
            left = (self.shown - self.began) / max(step - self.start, 1) * (steps - step)
            self.say(f"step {step}/{steps}  {rate}  {left:.0f} s left")

    def sync(self) -> None:
        """Return when every row is on the disk itself. A mounted bucket holds for sure only what was closed."""
        if self.main:
            with writing(self.path):
                self.file.close()
                sync(self.path)
            self._open()

    def close(self) -> None:
        """Flush and release everything."""
        if self.bar:
            self.bar.stop()
        if self.main:
            with contextlib.suppress(OSError):  # what did not fit on the disk was told when it was written
                self.file.close()
        if self.board:
            self.board.close()


class _Board:
    """A writer for TensorBoard, which a thread of its own writes for.

    A full disk ends that thread. Nothing is written for it any more, since it would wait for the thread without end.
    The run is told by metrics.jsonl, which is written first.
    """

    def __init__(self, writer: Any):
        self.writer, self.thread = writer, writer.file_writer.event_writer._worker

    def write(self, row: dict[str, Any]) -> None:
        """The metrics of a step."""
        if self.thread.is_alive():
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush what fits on the disk."""
        if self.thread.is_alive():
            with contextlib.suppress(OSError):
                self.writer.close()


def _open_board(directory: Path, start: int) -> _Board | None:
    """A TensorBoard writer that hides earlier rows of steps after `start`; None where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    with writing(directory):
        return _Board(SummaryWriter(str(directory), max_queue=1000, purge_step=start + 1))


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _step_of(line: bytes) -> float:
    """The step of a row, infinity for a line that a kill cut off."""
    try:
        return number(parse_object(line, "").get("step"), "step")
    except ValueError:
        return math.inf
