"""Requests to stop a step that lasts longer than the grace: the state before it is saved while it computes.

The steps of these runs are slow because they wait for a file in the middle of the compiled program: as long as the file
is absent they do not end at all, however fast the machine is.
"""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from butler_jax.runs import checkpoints
from butler_jax.training.interruptions import stop_requests
from tests import tiny_runs
from tests.host_processes import LEFT, Place, Signal
from tests.training import test_loop

REPOSITORY = Path(__file__).parent.parent.parent
GRACE = 5
BUSY = 5  # seconds for which a busy machine may keep the process waiting

HELD = """
import itertools, sys, time
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax
import jax.numpy as jnp
import numpy as np
jax.config.update("jax_numpy_rank_promotion", "raise")
from tests.training import test_loop

run_dir, held, seconds, moment = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]

def wait(step):
    if int(step) != held:
        time.sleep(seconds)
        return np.float32(1)
    (run_dir / "held").touch()
    while not (run_dir / "go").exists():
        time.sleep(0.02)
    return np.float32(1)

@partial(jax.jit, donate_argnums=0)
def step(state, model, batch):
    one = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), state.step + 1)
    return test_loop.step(state, model * one, batch)

validations = itertools.count(1)

def validate(module):
    if next(validations) == 2 and moment == "validation":
        wait(held)
    return {"validation_loss": 1.0}

test_loop.run(run_dir, step=step, validate=validate, keep=5, grace=int(sys.argv[6]))
print("not left")
"""
"""A run of test_loop whose step number `held` (or whose second validation) does not end; the others take `seconds`."""


def interrupt(run_dir: Path, *, held: int, seconds: float = 0.0, moment: str = "step", go_after: float | None = None):
    """Ask such a run to stop once it hangs; returns its status, what it said, and how long it took to end.

    go_after: seconds from the request to the end of the step.
    """
    run_dir.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HELD, REPOSITORY, run_dir, held, seconds, moment, GRACE]
    run = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not (run_dir / "held").exists():
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.02)
    time.sleep(0.2)  # the step before is written down
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    if go_after:
        time.sleep(go_after)
        assert run.poll() is None
        (run_dir / "go").touch()
    said = run.communicate(timeout=60)[0]
    return run.returncode, said, time.monotonic() - began


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The same run, which nothing disturbs: 8 steps, saved at 3, 6 and 8."""
    run_dir = tmp_path_factory.mktemp("straight")
    test_loop.run(run_dir, keep=5)
    return run_dir


def arrays(run_dir: Path, step: int) -> dict[str, bytes]:
    """The bytes of a checkpoint's arrays, whatever the number of processes that saved them."""
    saved, here = run_dir / "checkpoints" / str(step), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {n: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here) for n, m in ocp.metadata(saved).metadata.items()}
    return {name: np.asarray(array).tobytes() for name, array in ocp.load(saved, shapes).items()}


def assert_goes_on(run_dir: Path, straight: Path) -> None:
    """Started again, the run ends as the undisturbed one, bit for bit."""
    test_loop.run(run_dir, keep=5)
    assert arrays(run_dir, 8) == arrays(straight, 8)
    assert [row["loss"] for row in tiny_runs.rows(run_dir)] == [row["loss"] for row in tiny_runs.rows(straight)]


def record(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())[-1]


def test_an_interrupt_that_python_loses_is_raised_later_and_prints_no_traceback(monkeypatch):
    reported, inside = [], []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)

    def interrupt_twice(phase, info):
        if inside.pop() == "interrupted":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        raise ValueError("a fault that is not an interrupt")

    with pytest.raises(KeyboardInterrupt), stop_requests([].append, grace=1.0) as requests:
        gc.disable()
        gc.callbacks.append(interrupt_twice)
        try:
            inside[:] = ["fault", "interrupted"]  # the callback is called before and after the collection
            gc.collect()
        finally:
            gc.callbacks.remove(interrupt_twice)
            gc.enable()
        assert requests.refused
    assert [lost.exc_type for lost in reported] == [ValueError]


@pytest.mark.slow  # a process
def test_a_step_longer_than_the_grace_is_left_with_the_state_before_it(tmp_path, straight):
    """Steps of 4.5 s are beyond a grace of 5 s less the time to save."""
    status, said, seconds = interrupt(tmp_path / "run", held=3, seconds=4.5)
    assert status == 0 and "not left" not in said, said
    words = r"stopping now: this step takes about \d+ s more, and the grace is 5 s; the state before it is"
    assert re.search(words, said), said
    assert "stopped and saved at step 2; run the same command again to go on" in said
    assert seconds < GRACE + BUSY
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [2]
    assert [row["step"] for row in tiny_runs.rows(tmp_path / "run")] == [1, 2]
    assert (record(tmp_path / "run")["ended"], record(tmp_path / "run")["to"]) == ("stopped", 2)
    assert_goes_on(tmp_path / "run", straight)


@pytest.mark.slow  # a process each
@pytest.mark.parametrize(
    ("held", "moment", "stopped"),
    [
        (1, "step", "stopped before the first step was finished"),
        (4, "step", "stopped and saved at step 3"),  # its checkpoint is there
        (99, "validation", "stopped and saved at step 6"),
    ],
)
def test_what_does_not_end_within_the_grace_is_left(tmp_path, straight, held, moment, stopped):
    status, said, seconds = interrupt(tmp_path / "run", held=held, moment=moment)
    assert status == 0 and f"{stopped}; run the same command again" in said, said
    assert seconds < GRACE + BUSY
    there = checkpoints.steps(tmp_path / "run" / "checkpoints")
    assert there == {1: [], 4: [3], 99: [3, 6]}[held]
    assert_goes_on(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_short_step_that_hangs_is_waited_for(tmp_path, straight):
    """No state is kept for steps that are shorter than the grace."""
    status, said, _ = interrupt(tmp_path / "run", held=5, go_after=GRACE + 1)
    assert status == 0 and "stopped and saved at step 5; run the same command again to go on" in said
    assert_goes_on(tmp_path / "run", straight)


@pytest.mark.slow  # three times two processes
def test_a_step_longer_than_the_grace_is_left_by_all(tmp_path):
    """The second process is asked alone, in step 4, which never ends."""
    place = Place(tmp_path)
    metrics = place.directory / "left" / "metrics.jsonl"
    command = place.train("left", "--grace", "1", "--steps", "6", "--checkpoint-every", "100")
    signals = {0: Signal(0, 4, metrics), 1: Signal(signal.SIGTERM, 4, metrics)}
    ended = place.finish(2, command, signals=signals, program=LEFT)
    assert "stopping now: this step takes about" in ended[0].said
    assert "stopped and saved at step 3; run the same command again to go on" in ended[0].said
    assert place.kept("left") == [3] and len(place.losses("left")) == 3
    ended = place.finish(2, place.train("left", "--steps", "6"))
    assert "going on from step 3" in ended[0].said
    place.finish(2, place.train("undisturbed", "--steps", "6"))
    assert place.losses("left") == place.losses("undisturbed")
    assert arrays(place.directory / "left", 6) == arrays(place.directory / "undisturbed", 6)
