"""The training loop: dispatch a step, read the metrics of the one before, validate, save, go on where it stopped."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
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

from butler_jax.parallel import any_process, check_shared, gather, place_batch
from butler_jax.runs import Checkpoints, joined, recorded
from butler_jax.storage import number, parse_object, read_lines, read_object, shown, sync, to_dict, write_whole, writing
from butler_jax.training.config import FitConfig
from butler_jax.training.step import TrainState

CHANGEABLE = {
    "steps",
    "checkpoint_every",
    "keep",
    "eval_every",
    "log_every",
    "run_dir",
    "data_dir",
    "mesh",
    "distributed",
    "start_timeout",
    "host_timeout",
    "attention",
}
"""Settings that may differ when a run goes on: they leave the losses as they are (steps: the schedule is stretched)."""


class NonFiniteLoss(FloatingPointError):
    """A loss that is not a number or infinite; the run stops before it is saved."""


def check_run(run_dir: Path, config: FitConfig) -> None:
    """Check that a run already in the directory has the same settings; an absent one is fine.

    Raises ValueError naming the settings that differ and what to do, and where several hosts do not share it.
    """
    if jax.process_count() > 1:
        check_shared(run_dir)
    path = run_dir / "config.json"
    if not path.exists():
        return
    mine = to_dict(config)
    try:
        theirs = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to go on with the settings given now") from None
    different = [k for k in mine if k not in CHANGEABLE and theirs.get(k) != mine[k]]
    if different:
        raise ValueError(
            f"{run_dir} holds a run with other settings ("
            + ", ".join(f"{k}: {_brief(theirs.get(k))} there, {mine[k]!r} now" for k in different)
            + "); repeat them to go on, or choose another --run-dir"
        )


def _brief(value: Any) -> str:
    return f"{value!r:.300}" if isinstance(value, str) else shown(value)


def open_run(run_dir: Path, config: FitConfig) -> None:
    """Make the run directory with its config.json; raises as check_run does."""
    check_run(run_dir, config)
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


class Metrics:
    """metrics.jsonl, one object a step, TensorBoard where it is installed, and the screen."""

    def __init__(self, run_dir: Path, config: FitConfig, start: int):
        self.main = jax.process_index() == 0
        self.config = config
        self.console = Console()
        self.path = run_dir / "metrics.jsonl"
        self.board = None
        self.bar = None
        self.began, self.start = time.monotonic(), start
        if not self.main:
            return
        if self.path.exists():  # steps after the checkpoint are done again
            lines = [line for _, line in read_lines(self.path) if _step(line) <= start]
            write_whole(self.path, b"".join(lines))
        with writing(self.path):
            self.file = self.path.open("a")
        with contextlib.suppress(ImportError):
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"))
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("training", total=config.steps, completed=start, rate="")
            self.bar.start()

    def say(self, text: str) -> None:
        """A line on the screen of the first process."""
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(self, row: dict[str, Any]) -> None:
        """Record one step."""
        if not self.main:
            return
        with writing(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.board:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])
        step, steps = row["step"], self.config.steps
        rate = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=step, rate=rate)
        elif step % self.config.log_every == 0 or step == steps:
            left = (time.monotonic() - self.began) / max(step - self.start, 1) * (steps - step)
            self.say(f"step {step}/{steps}  {rate}  {left:.0f} s left")

    def sync(self) -> None:
        """Return when every row is on the disk itself. A mounted bucket is sure to have only what was closed."""
        if self.main:
            with writing(self.path):
                self.file.close()
                sync(self.path)
                self.file = self.path.open("a")

    def close(self) -> None:
        """Flush and release everything."""
        if self.bar:
            self.bar.stop()
        if self.main:
            with contextlib.suppress(OSError):  # what did not fit on the disk was told when it was written
                self.file.close()
        if self.board:
            self.board.close()


def _step(line: bytes) -> float:
    try:
        return number(parse_object(line, "").get("step"), "step")
    except ValueError:  # a line cut off by a kill
        return math.inf


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the loop to stop after the step; a second Ctrl-C stops at once."""
    asked = False

    def handler(number, frame):
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    old = {}
    with contextlib.suppress(ValueError):  # not the main thread: a notebook's own handling stays
        old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def fit(
    step: Callable[[TrainState, Any, dict], tuple[TrainState, dict]],
    state: TrainState,
    model: Any,
    batches: Any,
    config: FitConfig,
    *,
    mesh: jax.sharding.Mesh,
    run_dir: Path,
    about: dict,
    validate: Callable[[Any], dict[str, float]],
    forward_seconds: float | None = None,
) -> TrainState:
    """Run `step` until config.steps are done, from the newest checkpoint in run_dir if there is one.

    batches: next() gives a batch, get_state() and set_state() its place. validate(module) returns metrics, among
    them `validation_loss`, which names the best checkpoint. Every step is a line of metrics.jsonl: step, loss,
    gradient_norm, learning_rate, tokens_per_second, seconds, forward_ratio (to forward_seconds, the base's own
    forward pass on such a batch) and, where it was validated, what validate returned.

    Every start is recorded in run.json. Damaged checkpoints are set aside and an older one is taken. Returns early,
    saved, after Ctrl-C or SIGTERM; what it says is saved is on disk. Where several processes train, one of them needs
    to be asked, and all stop at the same step, the one after.

    Raises NonFiniteLoss naming step and batch; the last checkpoint before it stays. Raises OSError where a file or a
    checkpoint cannot be written, DamagedCheckpoint where no checkpoint is whole.
    """
    tokens = config.batch_size * config.length
    with Checkpoints(run_dir / "checkpoints", keep=config.keep, about=about) as checkpoints:
        start = gather(checkpoints.latest() or 0)[0]  # a file system may show it to the others later
        if start:
            state, place = checkpoints.restore(start, state)
            batches.set_state(place)
        joined(gather(batches.get_state()))  # raises where processes read different data
        metrics = Metrics(run_dir, config, start)
        for note in checkpoints.notes:
            metrics.say(note)
        if start >= config.steps:
            metrics.say(f"{run_dir} has all its {config.steps} steps; raise --steps to go on")
        elif start:
            metrics.say(f"going on from step {start} of {run_dir}")
        pending: tuple[int, dict] | None = None
        several, stop = jax.process_count() > 1, False
        clock = time.monotonic()

        def settle(extra: dict[str, float] | None = None) -> None:
            """Wait for the step that is out, check it and write it down."""
            nonlocal pending, clock, stop
            if pending is None:
                return
            number, values = pending
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            pending = None
            stop = bool(values.pop("stop", False))
            stop_unless_finite("loss", values["loss"], number)
            now = time.monotonic()
            seconds, clock = now - clock, now
            row = {"step": number, **values, "seconds": seconds, "tokens_per_second": tokens / seconds}
            if forward_seconds:
                row["forward_ratio"] = seconds / forward_seconds
            metrics.write({**row, **(extra or {})})

        def validated() -> dict[str, float]:
            nonlocal clock
            before = time.monotonic()
            values = validate(state.module)
            clock += time.monotonic() - before
            return values

        def stop_unless_finite(name: str, value: float, number: int) -> None:
            if not math.isfinite(value):
                last = checkpoints.latest()
                kept = f"the last good checkpoint is at step {last}" if last else "there is no checkpoint yet"
                raise NonFiniteLoss(
                    f"the {name} is {value} at step {number}, batch {number - 1} of {config.data} "
                    f"(seed {config.seed}); {kept}; lower --learning-rate or look at that batch"
                )

        with contextlib.closing(metrics), recorded(run_dir, about, start) as record, stop_requests() as stopping:
            number = start
            for number in range(start + 1, config.steps + 1):
                batch = place_batch(next(batches), mesh)
                settle()
                state, values = step(state, model, batch)
                if several:  # a request to any process is known to all with the step's metrics, after the next
                    values["stop"] = any_process(stopping(), mesh, values["loss"])
                pending = (number, values)
                end = number == config.steps or (stop if several else stopping())
                extra = {}
                save = end or number % config.checkpoint_every == 0
                if save or (config.eval_every and number % config.eval_every == 0):
                    jax.block_until_ready(values)
                    extra = validated()
                    settle(extra)
                    stop_unless_finite("validation loss after it", extra["validation_loss"], number)
                if save:
                    metrics.sync()
                    metric = {"loss": extra["validation_loss"]}
                    checkpoints.save(number, state, batches.get_state(), metric)
                if end:
                    break
            checkpoints.wait()
            record["to"] = number
            record["ended"] = "finished" if number >= config.steps else "stopped"
            if record["ended"] == "stopped":
                metrics.say(f"stopped and saved at step {number}; run the same command again to go on")
    return state
