"""The training loop: what it writes, what it keeps, and that a stopped run continues as if it had never stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax import distil, load_base
from butler_jax.parallel.mesh import make_mesh
from butler_jax.predictors.config import PredictorConfig
from butler_jax.runs import Checkpoints
from butler_jax.selection import AlwaysReadConfig, SelectionConfig
from butler_jax.training.config import FitConfig, TrainConfig
from butler_jax.training.loop import NonFiniteLoss, Run, check_run, fit, open_run
from butler_jax.training.step import TrainState
from tests import tiny_runs


class Numbers:
    """Batches of random numbers from a generator whose place can be saved. happens(n) is called before batch n."""

    def __init__(self, happens=lambda number: None):
        self.number, self.happens = 0, happens

    def __next__(self) -> dict[str, np.ndarray]:
        self.happens(self.number)
        self.number += 1
        return {"x": np.random.default_rng(self.number).normal(size=(2, 4)).astype(np.float32)}

    def get_state(self) -> dict:
        return {"number": self.number}

    def set_state(self, state: dict) -> None:
        self.number = state["number"]


@jax.jit
def step(state: TrainState, model, batch):
    """A few numbers that depend on every batch so far."""
    module = {"w": state.module["w"] * 0.9 + batch["x"].mean(0)}
    loss = jnp.sum(module["w"] ** 2) + model
    return TrainState(state.step + 1, module, state.optimiser), {"loss": loss, "gradient_norm": loss / 2}


def start() -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(4)}, ())


def run(run_dir: Path, *, batches=None, validate=None, step=step, **settings) -> TrainState:
    config = FitConfig(**{"steps": 8, "length": 4, "batch_size": 2, "checkpoint_every": 3, "eval_every": 0, **settings})
    open_run(run_dir, config)
    pieces = Run(
        config=config,
        directory=run_dir,
        mesh=make_mesh("data=1"),
        step=step,
        model=jnp.asarray(0.5),
        batches=batches or Numbers(),
        validate=validate or (lambda module: {"validation_loss": 1.0}),
        about={},
        forward_seconds=0.01,
    )
    return fit(pieces, start())


def kept(run_dir: Path) -> set[int]:
    return {int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> list[float]:
    """The losses of a run that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("straight")
    run(run_dir)
    return [row["loss"] for row in tiny_runs.rows(run_dir)]


def test_metrics_have_one_line_a_step(tmp_path):
    run(tmp_path, eval_every=2, validate=lambda m: {"validation_loss": 2.0, "hit_rate": 0.5, "recalled_mass": 0.9})
    rows = tiny_runs.rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert {"loss", "gradient_norm", "tokens_per_second", "seconds", "forward_ratio"} <= set(row)
        assert row["tokens_per_second"] == pytest.approx(8 / row["seconds"])
        assert row["forward_ratio"] == pytest.approx(row["seconds"] / 0.01)
        validated = row["step"] % 2 == 0 or row["step"] % 3 == 0  # asked for, or a checkpoint
        assert ("hit_rate" in row and "recalled_mass" in row and "validation_loss" in row) == validated


def test_metrics_are_closed_and_whole_at_every_checkpoint(tmp_path, monkeypatch):
    """A bucket's file system takes up what is closed."""
    seen = []

    def look(path):
        open_files = [os.path.realpath(file) for file in Path("/proc/self/fd").glob("*")]
        seen.append((str(path) in open_files, len(path.read_text().splitlines())))

    monkeypatch.setattr("butler_jax.training.metrics.sync", look)
    run(tmp_path)
    assert seen == [(False, 3), (False, 6), (False, 8)]
    assert len(tiny_runs.rows(tmp_path)) == 8


@pytest.mark.parametrize("number", [1, 3, 5, 7])
def test_a_run_that_died_goes_on_bit_for_bit(tmp_path, straight, number):
    def dies(at):
        if at == number:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="the machine is gone"):
        run(tmp_path, batches=Numbers(dies))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # the kill cut a line off
    run(tmp_path)
    rows = tiny_runs.rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == straight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_saves_and_says_how_to_go_on(tmp_path, straight, capsys, number):
    before = signal.getsignal(number)
    run(tmp_path, batches=Numbers(lambda at: signal.raise_signal(number) if at == 4 else None))
    assert signal.getsignal(number) is before
    said = capsys.readouterr().out
    assert "stopping after this step, about 0 s; again to stop now" in said
    assert "stopped and saved at step 4; run the same command again to go on" in said
    assert max(kept(tmp_path)) == 4
    run(tmp_path)
    assert "going on from step 4" in capsys.readouterr().out
    assert [row["loss"] for row in tiny_runs.rows(tmp_path)] == straight


def test_a_stopped_run_saves_without_a_validation(tmp_path):
    validated = []

    def validate(module):
        validated.append(module)
        return {"validation_loss": 1.0}

    run(
        tmp_path,
        validate=validate,
        batches=Numbers(lambda at: signal.raise_signal(signal.SIGTERM) if at == 4 else None),
    )
    regular = len(validated)
    with Checkpoints(tmp_path / "checkpoints") as found:
        assert found.loss(4) == math.inf
        assert found.best() != 4
    assert regular == 1


def test_a_second_interrupt_stops_at_once(tmp_path):
    def twice(at):
        if at == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batches=Numbers(twice))
    assert kept(tmp_path) == {3}


def test_a_finished_run_says_so_and_more_steps_go_on(tmp_path, capsys):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    state = run(tmp_path)
    assert int(state.step) == 8 and "has all its 8 steps; raise --steps to go on" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert int(run(tmp_path, steps=10).step) == 10
    assert "it was for 8 steps: from here on the learning rate is that of 10" in capsys.readouterr().out
    assert [row["step"] for row in tiny_runs.rows(tmp_path)] == list(range(1, 11))
    assert int(run(tmp_path, steps=4).step) == 10
    assert "has 10 steps, more than --steps 4; nothing is trained" in capsys.readouterr().out


def test_the_best_and_the_newest_checkpoints_are_kept(tmp_path):
    losses = iter([5.0, 4.0, 1.0, 3.0, 2.0, 2.5, 2.6, 2.7])
    run(tmp_path, checkpoint_every=1, keep=2, validate=lambda m: {"validation_loss": next(losses)})
    assert kept(tmp_path) == {3, 7, 8}


def not_finite(state, model, batch):
    state, metrics = step(state, model, batch)
    return state, {**metrics, "loss": jnp.where(state.step == 5, jnp.nan, metrics["loss"])}


def test_a_loss_that_is_not_finite_stops_naming_step_and_batch(tmp_path):
    message = (
        r"the loss is nan at step 5, batch 4 of python_docs \(seed 0\); the last good checkpoint is at step 3; lower"
    )
    with pytest.raises(NonFiniteLoss, match=message):
        run(tmp_path, step=not_finite)
    assert kept(tmp_path) == {3}
    assert [row["step"] for row in tiny_runs.rows(tmp_path)] == [1, 2, 3, 4]


def test_parameters_whose_validation_is_not_finite_are_not_saved(tmp_path):
    losses = iter([1.0, float("inf")])
    message = "the validation loss after it is inf at step 6, batch 5 .*checkpoint is at step 3"
    with pytest.raises(NonFiniteLoss, match=message):
        run(tmp_path, validate=lambda m: {"validation_loss": next(losses)})
    assert kept(tmp_path) == {3}


def test_other_settings_in_one_directory_are_refused_by_name(tmp_path):
    config = TrainConfig(run_dir=tmp_path / "run", seed=0)
    check_run(tmp_path / "run", config)  # nothing there yet
    open_run(tmp_path / "run", config)
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = TrainConfig(run_dir=tmp_path / "run", predictor=PredictorConfig(rank=8), seed=3)
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        open_run(tmp_path / "run", other)
    for words in ("seed: 0 there, 3 now", "rank: 16 there, 8 now", "choose another --run-dir"):
        assert words in str(error.value)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    check_run(tmp_path / "run", TrainConfig(run_dir=tmp_path / "run", steps=900, keep=1, log_every=1))


def test_a_directory_of_something_else_is_refused_and_stays_as_it_is(tmp_path):
    for content in ({"model_type": "llama", "vocab_size": 96}, {"fingerprint": "a", "predictor": {}, "steps": 1}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"config\.json is not that of a training: .* choose another --run-dir"):
            open_run(tmp_path, TrainConfig(run_dir=tmp_path))
        assert json.loads((tmp_path / "config.json").read_text()) == content
    (tmp_path / "saved" / "checkpoints" / "0").mkdir(parents=True)
    with pytest.raises(ValueError, match="saved holds a saved predictor; choose another --run-dir, and give --start"):
        open_run(tmp_path / "saved", TrainConfig(run_dir=tmp_path / "saved"))


def test_the_selection_of_a_training_has_no_budget(tmp_path):
    given = TrainConfig(run_dir=tmp_path, selection=SelectionConfig(sinks=2, recent=4, budget=0.5))
    assert given.selection == AlwaysReadConfig(sinks=2, recent=4)
    open_run(tmp_path, given)
    check_run(tmp_path, TrainConfig(run_dir=tmp_path, selection=AlwaysReadConfig(sinks=2, recent=4)))
    with pytest.raises(ValueError, match=r"selection must be an AlwaysReadConfig, with sinks and recent, got 0\.25"):
        TrainConfig(selection=0.25)


def test_the_steps_of_a_run_are_not_lowered_below_those_it_has(tmp_path):
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    open_run(tmp_path, TrainConfig(run_dir=tmp_path, steps=5))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 20


KILLED = """
import os, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
sys.path.insert(0, sys.argv[1])
from tests import tiny_runs
from butler_jax import distil, load_base
from butler_jax.training import loop
directory = Path(sys.argv[2])
place = {"base": directory / "base", "text": directory / "book.txt", "data_dir": directory / "data"}
taken, place_batch = 0, loop.place_batch

def place_or_die(batch, mesh):
    global taken
    taken += 1
    if taken == 7:
        while not (directory / "killed" / "checkpoints" / "3").exists():
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    return place_batch(batch, mesh)

loop.place_batch = place_or_die
distil(load_base(str(place["base"])), tiny_runs.settings(place, directory / "killed", checkpoint_every=3))
"""


@pytest.mark.slow
def test_a_killed_distillation_goes_on_bit_for_bit(tmp_path):
    place = tiny_runs.make_place(tmp_path)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent.parent.parent), str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert [row["step"] for row in tiny_runs.rows(tmp_path / "killed")] in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
    base = load_base(str(place["base"]))
    for name in ("killed", "straight"):
        distil(base, tiny_runs.settings(place, tmp_path / name, checkpoint_every=3))
    killed, straight = (tiny_runs.rows(tmp_path / name) for name in ("killed", "straight"))
    assert [row["step"] for row in killed] == list(range(1, 9))
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert [row[name] for row in killed] == [row[name] for row in straight]
    for name in ("validation_loss", "hit_rate", "recalled_mass"):
        assert killed[-1][name] == straight[-1][name]
    assert json.loads((tmp_path / "killed" / "config.json").read_text())["predictor"]["kind"] == "lookahead"


@pytest.mark.slow
def test_a_base_with_a_hole_stops_the_distillation(tmp_path):
    place = tiny_runs.make_place(tmp_path)
    base = load_base(str(place["base"]))
    base.model.layers.k[...] = base.model.layers.k[...].at[3, 0, 0, 0].set(jnp.nan)
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 1, batch 0 of text:.*no checkpoint yet"):
        distil(base, tiny_runs.settings(place, tmp_path / "run"))
    assert kept(tmp_path / "run") == set()
