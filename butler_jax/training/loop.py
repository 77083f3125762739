"""The training loop: dispatch a step, wait for its metrics, validate, save, go on where it stopped.

With several processes, what one of them must tell the others travels with the step's metrics.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from butler_jax.parallel import any_process, check_shared, exchange, gather, place_batch, stand_alike, tell
from butler_jax.runs import Checkpoints, Record, copy_to_host, joined, read_settings, recorded, steps
from butler_jax.storage import shown, to_dict, write_whole
from butler_jax.training.config import FitConfig
from butler_jax.training.interruptions import StopRequests, stop_requests
from butler_jax.training.metrics import Metrics
from butler_jax.training.step import TrainState

CHANGEABLE = {
    "steps",
    "checkpoint_every",
    "keep",
    "eval_every",
    "log_every",
    "run_dir",
    "out",
    "data_dir",
    "strict_data",
    "mesh",
    "distributed",
    "start_timeout",
    "host_timeout",
    "grace",
    "attention",
}
"""Settings that may differ when a run goes on: they leave the losses as they are (steps: the schedule is stretched)."""

LONG = 10.0  # seconds of a first step that are told


class NonFiniteLoss(FloatingPointError):
    """A loss that is not a number or infinite; the run stops before it is saved."""


def check_run(run_dir: Path, config: FitConfig) -> None:
    """Check that a run already in the directory has the same settings; an absent one is fine.

    Raises ValueError naming the settings that differ and what to do, and where several hosts do not share it.
    """
    if jax.process_count() > 1:
        check_shared(run_dir)
    if 0 in steps(run_dir / "checkpoints"):  # a training saves from its first step on
        raise ValueError(
            f"{run_dir} holds a saved predictor; choose another --run-dir, and give --start {run_dir} to go on from it"
        )
    path = run_dir / "config.json"
    if not path.exists():
        return
    mine = to_dict(config)
    try:
        theirs = read_settings(run_dir)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to go on with the settings given now") from None
    if "steps" not in theirs or "fingerprint" in theirs:
        raise ValueError(f"{path} is not that of a training: {run_dir} holds something else; choose another --run-dir")
    defaults = to_dict(type(config)())  # of settings that are newer than the run
    if different := list(_differences(theirs, {k: v for k, v in mine.items() if k not in CHANGEABLE}, defaults)):
        raise ValueError(
            f"{run_dir} holds a run with other settings ({', '.join(different)}); repeat them to go on, or choose "
            "another --run-dir"
        )


def _differences(theirs: dict, mine: dict, defaults: dict) -> Iterator[str]:
    """The settings that differ, those of nested configurations one by one, as "rank: 16 there, 8 now"."""
    for name, value in mine.items():
        there = theirs.get(name, defaults[name])
        if isinstance(value, dict) and isinstance(there, dict):
            yield from _differences(there, value, defaults[name])
        elif there != value:
            yield f"{name}: {_brief(there)} there, {value!r} now"


def _brief(value: Any) -> str:
    return f"{value!r:.300}" if isinstance(value, str) else shown(value)


def open_run(run_dir: Path, config: FitConfig) -> None:
    """Make the run directory with its config.json; raises as check_run does.

    The steps in it are not lowered below those of the newest checkpoint.
    """
    check_run(run_dir, config)
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        settings = {**to_dict(config), "steps": max([config.steps, *steps(run_dir / "checkpoints")])}
        write_whole(run_dir / "config.json", json.dumps(settings, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The pieces of a training run, prepared.

    Attributes:
        config: Its settings.
        directory: Where checkpoints, metrics and records go; this process holds it.
        mesh: The devices; set while it trains.
        step: (state, model, batch) -> (state, metrics), as `make_train_step` returns it.
        model: The frozen base; None where the trained module is the whole model.
        batches: next() gives this process's rows of a batch; get_state() and set_state() its place.
        validate: The trained module -> metrics, among them `validation_loss`, which names the best checkpoint.
        about: Facts stored with every checkpoint and start, JSON.
        forward_seconds: Of the base's own forward pass on such a batch; None where it was not measured.
    """

    config: FitConfig
    directory: Path
    mesh: jax.sharding.Mesh
    step: Callable[[TrainState, Any, dict], tuple[TrainState, dict]]
    model: Any
    batches: Any
    validate: Callable[[Any], dict[str, float]]
    about: dict[str, Any]
    forward_seconds: float | None = None


def fit(run: Run, state: TrainState) -> TrainState:
    """Train until all steps are done, from the newest checkpoint of the run's directory if there is one.

    Every step is a line of metrics.jsonl: step, loss, gradient_norm, learning_rate, tokens_per_second, seconds,
    forward_ratio (seconds over forward_seconds) and, where it was validated, what `validate` returned. Every start is
    recorded in run.json. Damaged checkpoints are set aside and an older one is taken.

    After Ctrl-C or SIGTERM it finishes the step, saves without a validation, and returns early. Where several processes
    train, one of them needs to be asked, and all stop at the same step. Where that would outlast `config.grace`, a
    thread saves the newest finished state while the step computes, and ends the process with status 0. What is reported
    as saved is on disk.

    Args:
        state: The state before the first step; donated.

    Returns:
        The state after the last step taken.

    Raises:
        NonFiniteLoss: Naming step and batch; the last checkpoint before it stays.
        OSError: Where a file or a checkpoint cannot be written.
        DamagedCheckpoint: Where there are checkpoints and none is whole.
    """
    config, directory = run.config, run.directory
    about = {**run.about, "steps": config.steps}
    with Checkpoints(directory / "checkpoints", keep=config.keep, about=about) as checkpoints:
        start = gather(checkpoints.latest() or 0)[0]  # a file system may show it to the others later
        if start:
            state, place = checkpoints.restore(start, state)
            run.batches.set_state(place)
        joined(gather(run.batches.get_state()))  # raises where processes read different data
        metrics = Metrics(directory, config, start)
        for note in checkpoints.notes:
            metrics.say(note)
        if start > config.steps:
            metrics.say(f"{directory} has {start} steps, more than --steps {config.steps}; nothing is trained")
        elif start == config.steps:
            metrics.say(f"{directory} has all its {start} steps; raise --steps to go on")
        elif start:
            metrics.say(f"going on from step {start} of {directory}")
            planned = checkpoints.facts(start).get("steps", config.steps)
            if planned != config.steps:
                metrics.say(f"it was for {planned} steps: from here on the learning rate is that of {config.steps}")
        with (
            contextlib.closing(metrics),
            recorded(directory, run.about, start) as record,
            stop_requests(metrics.say, config.grace) as requests,
        ):
            loop = Loop(run, state, checkpoints, metrics, requests, record)
            last = loop.train(start)
            checkpoints.wait()
            loop.conclude(last)
    return loop.state


class Finished(NamedTuple):
    """The state after a finished step, to be saved while the next one computes.

    Attributes:
        step: The number of the step.
        state: None where it is saved already, or nothing was trained yet.
        place: What the batches said of their place after it.
    """

    step: int
    state: TrainState | None
    place: Any


class Loop:
    """The steps of one start. The next batch is read while a step computes, and the step is waited for."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        checkpoints: Checkpoints,
        metrics: Metrics,
        requests: StopRequests,
        record: Record,
    ):
        self.run, self.state = run, state
        self.checkpoints, self.metrics, self.requests, self.record = checkpoints, metrics, requests, record
        self.several = jax.process_count() > 1
        self.pending: tuple[int, dict] | None = None  # number and metrics of the dispatched step
        self.tokens = 0  # of its batch
        self.row: dict[str, Any] | None = None  # of the step that is finished and not written down
        self.newest: Finished | None = None  # what a thread can save meanwhile
        self.saved = 0  # the last step with a checkpoint
        self.any_asked = False  # with several processes: any of them was asked to stop, and all know it
        self.usual: float | None = None  # seconds of the step before
        self.usual_validation: float | None = None
        self.keeps_state = False  # whether steps outlast the grace
        self.clock = self.began = time.monotonic()

    def train(self, start: int) -> int:
        """Take the steps after `start`, to the end or a request to stop; returns the last one, which is saved."""
        config, self.saved = self.run.config, start
        if start < config.steps:
            self.metrics.say("compiling the training step")
        for number in range(start + 1, config.steps + 1):
            place = self.run.batches.get_state()
            batch = place_batch(next(self.run.batches), self.run.mesh)
            self.finish_step()
            self.write_row({})
            if self.stopping():  # a machine that is taken away leaves no time to validate
                self.save(number - 1, None, place)
                return number - 1
            self.keep_state(number - 1, place)
            self.dispatch_step(number, batch)
            last = number == config.steps
            saves = last or number % config.checkpoint_every == 0
            if saves or (config.eval_every and number % config.eval_every == 0):
                self.finish_step()
                place = self.run.batches.get_state()
                loss = None if self.stopping() else self.validate(number, place)
                self.write_row({})
                stops = last or self.stopping()
                if saves or stops:
                    self.save(number, loss, place)
                if stops:
                    return number
        return start

    def conclude(self, last: int) -> None:
        """Record how the start ended, after the step `last`, and say how to go on."""
        finished = last >= self.run.config.steps
        self.record.update(to=last, ended="finished" if finished else "stopped")
        if not finished:
            what = f"stopped and saved at step {last}" if last else "stopped before the first step was finished"
            self.metrics.say(f"{what}; run the same command again to go on")

    def save(self, number: int, loss: float | None, place: Any) -> None:
        """Save a checkpoint after a step.

        Args:
            loss: Of its validation; None without one.
            place: What the batches said of their place after it.
        """
        tell(f"{self.requests.key}/passed", number)  # a process that would leave an earlier step takes part instead
        self.metrics.sync()
        if number > self.saved:
            self.checkpoints.save(number, self.state, place, loss)
            self.saved = number
        self.requests.saving = self.checkpoints.seconds

    def dispatch_step(self, number: int, batch: dict) -> None:
        """Dispatch a step, after the one before it was written down."""
        self.began = time.monotonic()
        with self.waiting():  # the first is compiled
            self.state, values = self.run.step(self.state, self.run.model, batch)
        if self.several:  # a request to any process is known to all with the step's metrics, after the next
            values["stop"] = any_process(self.requests.asked, self.run.mesh, values["loss"])
            values["long"] = any_process(self.outlasts_grace(), self.run.mesh, values["stop"])
        self.pending, self.tokens = (number, values), jax.tree.leaves(batch)[0].size  # each is [B, T]

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """The main thread waits for the step; of several processes, a step more may be needed to stop."""
        usual = None if self.usual is None else self.usual * (2 if self.several else 1)
        return self.requests.waiting(self.began, usual, self.leave if self.newest else None)

    def outlasts_grace(self) -> bool:
        """Whether steps are too long to be waited for after a request."""
        return self.usual is not None and self.usual * (2 if self.several else 1) > self.requests.limit

    def keep_state(self, number: int, place: Any) -> None:
        """Keep what is needed to save the state after a step while the next one, which takes its memory, computes."""
        if number == self.saved:
            self.newest = Finished(number, None, place)
        elif self.keeps_state:
            self.newest = Finished(number, copy_to_host(self.state), place)
        else:
            self.newest = None

    def stopping(self) -> bool:
        """Whether the finished step is the last because of a request."""
        return self.any_asked if self.several else self.requests.asked

    def validate(self, number: int, place: Any) -> float:
        """Validate after a step and write it down; returns the loss. The time it takes is not the next step's."""
        before = time.monotonic()
        self.newest = Finished(number, self.state, place)
        with self.requests.waiting(before, self.usual_validation, self.leave):
            validation = self.run.validate(self.state.module)
        self.clock = time.monotonic()
        self.usual_validation = self.clock - before
        self.write_row(validation)
        self.check_finite("validation loss after it", validation["validation_loss"], number)
        return validation["validation_loss"]

    def leave(self) -> bool:
        """Save the newest finished state from a thread, while the main thread waits; True where the process may end.

        Of several processes, one may have finished a step that the others have not; these wait for the step's end.
        """
        key, until = self.requests.key, time.monotonic() + self.run.config.host_timeout
        step, state, place = self.newest
        tell(f"{key}/leaving", True)
        if not stand_alike(f"{key}/newest", step, until, passed=f"{key}/passed"):
            return False
        self.write_row({})
        self.metrics.sync()
        if state is None:
            self.checkpoints.wait(agree=False)
        else:
            places = exchange(f"{key}/place", place, until)
            self.checkpoints.save_beside(step, copy_to_host(state), joined(places), None)
        self.conclude(step)
        self.record.write()
        self.metrics.close()
        exchange(f"{key}/saved", True, until)  # the first process has named the checkpoint
        tell(f"{key}/heard", True)
        if self.several and jax.process_index() == 0:  # the others hear through this one, which therefore ends last
            exchange(f"{key}/heard", True, until)
            time.sleep(1.0)
        return True

    def finish_step(self) -> None:
        """Wait for the dispatched step and check its loss."""
        if self.pending is None:
            return
        (number, values), self.pending = self.pending, None
        with self.waiting():
            values = {name: float(value) for name, value in jax.device_get(values).items()}
        self.any_asked = bool(values.pop("stop", False))
        self.check_finite("loss", values["loss"], number)
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        if self.usual is None and seconds > LONG and number < self.run.config.steps:
            self.metrics.say(f"the first step took {seconds:.0f} s with its compilation")
        self.usual = seconds
        self.keeps_state = bool(values.pop("long", self.outlasts_grace()))
        self.record["to"] = number
        self.row = {"step": number, **values, "seconds": seconds, "tokens_per_second": self.tokens / seconds}
        if self.run.forward_seconds:
            self.row["forward_ratio"] = seconds / self.run.forward_seconds

    def write_row(self, validation: dict[str, float]) -> None:
        """Write down the finished step."""
        if self.row is not None:
            self.metrics.write({**self.row, **validation})
            self.row = None

    def check_finite(self, name: str, value: float, number: int) -> None:
        """Raise NonFiniteLoss where a loss of a step is not finite."""
        if math.isfinite(value):
            return
        last, config = self.checkpoints.latest(), self.run.config
        kept = f"the last good checkpoint is at step {last}" if last else "there is no checkpoint yet"
        raise NonFiniteLoss(
            f"the {name} is {value} at step {number}, batch {number - 1} of {config.data} "
            f"(seed {config.seed}); {kept}; lower --learning-rate, in another --run-dir, or look at that batch"
        )
