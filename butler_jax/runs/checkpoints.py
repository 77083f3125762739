"""Checkpoints through Orbax: the only file that imports it.

A run directory holds `config.json`, `metrics.jsonl` and `checkpoints/`. A checkpoint holds the trained module, the
optimiser, the step and the state of the data iterators. It names the base it belongs to and its fingerprint, and never
holds the base itself.

Orbax writes a checkpoint under a temporary name. Before it is renamed it is sealed: its files are on the disk itself,
`digests.json` has a digest of each, and none is written again. Training sets damaged checkpoints aside and goes on from
the newest whole one. Asking for a damaged checkpoint is an error. Processes share the directory, so only the first one
seals checkpoints and looks for damage.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from butler_jax.model import compare_leaves, name_leaves, place_leaves
from butler_jax.parallel import gather
from butler_jax.runs import digests
from butler_jax.runs.finished_checkpoints import METADATA, UNFINISHED, damage, pick_best, read_facts, steps
from butler_jax.storage import sync

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every save, and every error with a traceback


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what was written."""


LARGEST_STATE = 4
"""The most values of a checkpoint for each value of its module. AdamW leaves 3; a file of others may claim more."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by the metric `loss`.

    Opening them to write removes what a killed save left, and moves damaged checkpoints to `damaged/` beside the
    directory; `notes` has a line for each. Use as a context manager, or call close().

    Attributes:
        notes: Lines for the user.
        seconds: How long the last save took; 0 before the first.

    Args:
        keep: How many of the newest are kept. None only reads and does not disturb a save of another process.
        about: JSON facts that are stored with every checkpoint, such as the configuration and the base.

    Raises:
        DamagedCheckpoint: All checkpoints are damaged. Nothing is moved then.
    """

    def __init__(self, directory: Path, *, keep: int | None = None, about: dict | None = None):
        self.directory = Path(directory).absolute()
        self.about = about or {}
        self.notes: list[str] = []
        self.seconds = 0.0
        self._keep = keep
        self._saving: int | None = None
        if keep is not None:
            self._tidy()
            self._background = ThreadPoolExecutor(1, "checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_):
        self.close(agree=kind is None)

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, in order. Waits for the save in flight."""
        self.wait()
        return steps(self.directory)

    def latest(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest loss, the newest of equal ones; None where there is none.

        Raises as loss() does.
        """
        return pick_best({step: self.loss(step) for step in self.steps()})

    def loss(self, step: int) -> float:
        """The loss saved with a checkpoint; infinite for one that was saved without a validation.

        Raises:
            DamagedCheckpoint: The file that holds it is damaged, or has no loss.
        """
        if found := damage(self.directory / str(step), only=METADATA):
            raise self._damaged(step, found)
        try:
            loss = self.facts(step)["metrics"]["loss"]
        except (KeyError, TypeError):
            raise self._damaged(step, ["it has no loss"]) from None
        return math.inf if loss is None else loss

    def check(self, step: int) -> None:
        """Raise DamagedCheckpoint, with the steps of whole ones, where a checkpoint is not what was written."""
        if found := damage(self.directory / str(step)):
            raise self._damaged(step, found)

    def _damaged(self, step: int, found: list[str]) -> DamagedCheckpoint:
        whole = [str(s) for s in steps(self.directory) if s != step and not damage(self.directory / str(s))]
        remedy = (
            f"whole: step {', '.join(whole)}; to use the best of them, move {self.directory / str(step)} away"
            if whole
            else "no other is whole: train again, in another directory"
        )
        return DamagedCheckpoint(f"checkpoint {step} of {self.directory.parent} is damaged ({_few(found)}); {remedy}")

    def _tidy(self) -> None:
        """Move damaged checkpoints to `damaged/` and remove unfinished ones, on the first process alone."""
        problem = ""
        if jax.process_index() == 0:
            there = steps(self.directory)
            found = {step: words for step in there if (words := damage(self.directory / str(step)))}
            if found and len(found) == len(there):
                problem = f"no checkpoint in {self.directory} is whole ({_listed(found)})"
            for step, words in found.items() if not problem else ():
                aside = self.directory.parent / "damaged"
                aside.mkdir(exist_ok=True)
                taken = sum(path.name.split(".")[0] == str(step) for path in aside.iterdir())
                target = aside / (f"{step}.{taken}" if taken else str(step))
                (self.directory / str(step)).rename(target)
                self.notes.append(f"checkpoint {step} is damaged ({_few(words)}): it is now {target}")
            for left in self.directory.glob(f"*{UNFINISHED}*") if not problem else ():
                shutil.rmtree(left, ignore_errors=True)
        if problem := gather(problem)[0]:
            raise DamagedCheckpoint(
                f"{problem}; there is nothing to go on from: choose another --run-dir, or remove "
                f"{self.directory.parent} to start again"
            )

    def save(self, step: int, state: Any, data_state: Any, loss: float | None) -> None:
        """Save a checkpoint in the background. A step that is saved already is left alone.

        A checkpoint is safe once wait() or the next save() has returned.

        Args:
            data_state: State of this process's data iterator, JSON.
            loss: Of the validation after the step; None without one.

        Raises:
            OSError: This save cannot begin, or the one before it failed.
        """
        if step in self.steps():
            return
        copied = jax.tree.map(jnp.copy, state)  # the next step reuses the memory of the originals
        self._begin(step, copied, joined(gather(data_state)), loss)

    def save_beside(self, step: int, state: Any, data_state: Any, loss: float | None) -> None:
        """Save a checkpoint while the devices compute, and return when it is safe on this process's side.

        All processes have to call it. It runs no computation on a device, and no collective.

        Args:
            state: On the host, as `copy_to_host` makes it.
            data_state: State of the data iterators of all processes, joined.
            loss: As for save().

        Raises:
            OSError: It cannot be written, or the save before it failed.
        """
        self.wait(agree=False)
        if step in steps(self.directory):
            return
        self._begin(step, state, data_state, loss, active_processes=set(range(jax.process_count())))
        self.wait(agree=False)

    def _begin(self, step: int, state: Any, data_state: Any, loss: float | None, **processes: Any) -> None:
        """Begin a save of arrays that nobody changes. processes: Orbax's options for several."""
        about = {**self.about, "step": step, "data": data_state, "metrics": {"loss": loss}}
        self._began = time.monotonic()
        options = ocp.options.MultiprocessingOptions(**processes)
        with self._explained(step), ocp.Context(multiprocessing_options=options):
            there = self._unfinished(step)
            if jax.process_index() == 0:  # where nothing can be made, Orbax's threads would wait for five minutes
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryDirectory(dir=self.directory).cleanup()
            writing = ocp.save_async(there, name_leaves(state), custom_metadata=about, overwrite=True)
        # Orbax keeps a thread and three open files for a save until its result is asked for.
        self._written = self._background.submit(writing.result)
        self._named = self._background.submit(self._name, step)
        self._saving = step

    def _unfinished(self, step: int) -> Path:
        return self.directory / f"{step}{UNFINISHED}"

    def _name(self, step: int) -> None:
        """Seal and rename what all processes have written, then remove older checkpoints. Runs in the background."""
        self._written.result()
        if jax.process_index() == 0:
            there = self._unfinished(step)
            digests.seal(there)
            there.rename(self.directory / str(step))
            sync(self.directory)
            self._remove_old()
        self.seconds = time.monotonic() - self._began

    def restore(self, step: int, state: Any) -> tuple[Any, Any]:
        """Restore a checkpoint, whatever the number of processes that saved it.

        Args:
            state: Arrays or shapes whose structure, dtypes and shardings the result takes.

        Returns:
            The state, and the data state of all processes.

        Raises:
            ValueError: The base is another, or names or shapes differ.
        """
        metadata = ocp.metadata(self.directory / str(step))
        saved, mine = metadata.custom_metadata, self.about
        if "fingerprint" in mine and saved.get("fingerprint") != mine["fingerprint"]:
            raise ValueError(
                f"{self.directory} belongs to base {saved.get('base')!r} (fingerprint {saved.get('fingerprint')}), "
                f"not to {mine.get('base')!r} ({mine.get('fingerprint')}); load that base, or choose another run "
                "directory"
            )
        wanted = name_leaves(state)
        compare_leaves(metadata.metadata, wanted, self.directory / str(step))
        loaded = ocp.load(self.directory / str(step), jax.tree.map(_abstract, wanted))
        return place_leaves(state, loaded), saved["data"]

    def restore_module(self, step: int, shapes: Any) -> Any:
        """Restore the trained module alone, on the first device.

        Its arrays are not committed to it, as those of a base are not. JAX compiles a program twice that takes both
        kinds.

        Args:
            shapes: The module under jax.eval_shape.

        Raises:
            ValueError: Names or shapes differ, or the checkpoint holds more than a training saves.
        """
        saved = ocp.metadata(self.directory / str(step)).metadata
        wanted = {f"module.{name}": leaf for name, leaf in name_leaves(shapes).items()}
        mine = {name: leaf for name, leaf in saved.items() if name.startswith("module.")}
        compare_leaves(mine, wanted, self.directory / str(step))
        sizes = [sum(math.prod(leaf.shape) for leaf in leaves) for leaves in (saved.values(), mine.values())]
        if sizes[0] > LARGEST_STATE * sizes[1] + 1024:
            raise ValueError(
                f"{self.directory / str(step)} holds {sizes[0]} values with a predictor of {sizes[1]}, more "
                "than any training leaves"
            )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {n: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device) for n, m in saved.items()}
        loaded = ocp.load(self.directory / str(step), abstract)
        return place_leaves(shapes, {n.removeprefix("module."): jnp.asarray(np.asarray(loaded[n])) for n in mine})

    def facts(self, step: int) -> dict:
        """What `about` held when the step was saved."""
        return read_facts(self.directory / str(step))

    def wait(self, *, agree: bool = True) -> None:
        """Block until the save in flight is safe on disk. agree: whether all processes share the outcome.

        Raises:
            OSError: The checkpoint could not be written.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        with self._explained(step):
            self._written.result()
            failed = self._named.exception()  # set on the first process only
            told = "" if failed is None else str(failed) or type(failed).__name__
            if told := gather(told)[0] if agree else told:
                raise OSError(told) from failed

    def _remove_old(self) -> None:
        """Remove the checkpoints that are neither the best nor among the newest `keep`."""
        losses = {}
        for step in steps(self.directory):
            with contextlib.suppress(DamagedCheckpoint):  # damaged since this start: the next start sets it aside
                losses[step] = self.loss(step)
        best = pick_best(losses)
        for step in list(losses)[: -self._keep]:
            if step != best:
                doomed = self._unfinished(step)
                (self.directory / str(step)).rename(doomed)
                shutil.rmtree(doomed)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turn errors of a save into one line. Orbax passes on whatever its parts raise."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].split(" [")[0]
            last = max(steps(self.directory), default=None)
            kept = "no checkpoint is there yet" if last is None else f"step {last} is safe"
            raise OSError(
                f"checkpoint {step} could not be written to {self.directory}: {reason}; {kept}. Free some space or "
                "mend the directory, and run the same command again to go on"
            ) from error

    def close(self, *, agree: bool = True) -> None:
        """Finish the save in flight; arguments as for wait()."""
        try:
            self.wait(agree=agree)
        finally:
            if self._keep is not None:
                self._background.shutdown()


def _few(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{words[0]}, and {len(words) - 1} more"


def _listed(found: dict[int, list[str]]) -> str:
    return ", ".join(f"{step}: {_few(words)}" for step, words in found.items())


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def copy_to_host(state: Any) -> Any:
    """Begin to copy arrays to the host's memory, split as they are. The originals may be donated at once."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host")), state)


def joined(states: list[Any], name: str = "state") -> Any:
    """Join the data states of all processes, called `name` in the error, into one: lists are joined item by item.

    Raises:
        ValueError: Other values differ, so the processes read different data.
    """
    first = states[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: joined([state[key] for state in states if key in state], key) for key in keys}
    if isinstance(first, list):
        return [joined(list(items), name) for items in zip(*states, strict=True)]
    different = sorted({str(state) for state in states})
    if len(different) != 1:
        raise ValueError(
            f"the processes read different data: {name} is {' and '.join(different)}; give all hosts the same files "
            "and settings"
        )
    return first
