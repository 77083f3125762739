"""Faults of training runs: kills, full and read-only disks, damaged files, other data, requests to stop.

The oracle is always the undisturbed run: the same numbers, bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from benchmarks import faults
from benchmarks.training_process import TrainingProcess, starts
from butler_jax import load_base
from butler_jax.cli import main
from butler_jax.runs import checkpoints
from butler_jax.runs.checkpoints import Checkpoints, DamagedCheckpoint
from butler_jax.runs.saved_predictor import load_predictor
from tests import tiny_runs
from tests.marked import long
from tests.training import test_loop

REPOSITORY = Path(__file__).parent.parent.parent
STEPS, EVERY = 300, 15


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """All that is in a checkpoint's arrays: parameters, the optimiser's moments and counts, the step."""
    return {name: np.asarray(value) for name, value in ocp.load(run_dir / "checkpoints" / str(step)).items()}


def assert_same(run_dir: Path, straight: Path, steps: int) -> None:
    """The end of a run, and all that it wrote on its way, are those of the undisturbed run."""
    mine, theirs = arrays(run_dir, steps), arrays(straight, steps)
    assert set(mine) == set(theirs)
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype and value.tobytes() == theirs[name].tobytes(), name
    rows, wanted = tiny_runs.rows(run_dir), tiny_runs.rows(straight)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for name in ("loss", "gradient_norm", "validation_loss"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in wanted], name


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run of test_loop's numbers that nothing disturbs: 8 steps, saved at 3, 6 and 8."""
    run_dir = tmp_path_factory.mktemp("straight")
    test_loop.run(run_dir, keep=5)
    return run_dir


def stopped_at(run_dir: Path, number: int) -> None:
    """The same run, ended by an error before batch `number`."""

    def dies(at):
        if at == number:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="the machine is gone"):
        test_loop.run(run_dir, batches=test_loop.Numbers(dies), keep=5)


# Damage


def damages(path: Path, every: int) -> Iterator[str]:
    """The file without every so many-th bit in turn, and its absence; afterwards it is as before."""
    good = path.read_bytes()
    for at in range(0, len(good), every):
        changed = bytearray(good)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        yield f"byte {at}"
    path.unlink()
    yield "missing"
    path.write_bytes(good)


def files_of(checkpoint: Path) -> list[Path]:
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert len(found) > 8  # arrays, manifests, metadata
    return found


def test_damage_to_any_byte_is_seen_or_touches_nothing_that_is_read(straight, tmp_path):
    run_dir = shutil.copytree(straight, tmp_path / "run")
    checkpoint, wanted = run_dir / "checkpoints" / "8", arrays(run_dir, 8)
    facts = checkpoints.read_facts(checkpoint)
    seen = Counter()
    for path in files_of(checkpoint):
        for what in damages(path, every=5):
            found = checkpoints.damage(checkpoint)
            seen[path.name, bool(found)] += 1
            if not found:  # white space
                assert path.name == "digests.json", (path, what)
                assert checkpoints.read_facts(checkpoint) == facts
                got = arrays(run_dir, 8)
                assert {n: v.tobytes() for n, v in got.items()} == {n: v.tobytes() for n, v in wanted.items()}
    assert seen["digests.json", True] > seen["digests.json", False]


@pytest.mark.slow  # each file twice, with a run each
def test_a_run_goes_on_from_before_any_damaged_file(straight, tmp_path, capsys):
    start = tmp_path / "start"
    stopped_at(start, 7)
    assert checkpoints.steps(start / "checkpoints") == [3, 6]
    tried = 0
    for path in files_of(start / "checkpoints" / "6"):
        for what in damages(path, every=1 << 20):  # the first byte, and the absence
            if not checkpoints.damage(start / "checkpoints" / "6"):
                continue
            run_dir = shutil.copytree(start, tmp_path / "run")
            test_loop.run(run_dir, keep=5)
            out = capsys.readouterr().out
            assert "checkpoint 6 is damaged (" in out and f"it is now {run_dir}/damaged/6" in out, (path, what)
            assert f"going on from step 3 of {run_dir}" in out
            assert_same(run_dir, straight, 8)
            assert (run_dir / "damaged" / "6" / path.relative_to(start / "checkpoints" / "6")).exists() == (
                what != "missing"
            )
            shutil.rmtree(run_dir)
            tried += 1
    assert tried > 16


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_taken(straight, tmp_path, capsys):
    run_dir = tmp_path / "run"
    for again in range(2):  # the second time, one of that name lies there already
        stopped_at(run_dir, 7)
        flip(run_dir / "checkpoints" / "6" / "state" / "manifest.ocdbt")
        assert again == 0 or (run_dir / "damaged" / "6").exists()
    test_loop.run(run_dir, keep=5)
    out = capsys.readouterr().out
    assert f"checkpoint 6 is damaged (state/manifest.ocdbt is not as it was written): it is now {run_dir}" in out
    assert f"going on from step 3 of {run_dir}" in out
    assert {path.name for path in (run_dir / "damaged").iterdir()} == {"6", "6.1"}
    assert_same(run_dir, straight, 8)


def test_a_run_without_a_whole_checkpoint_is_refused_untouched(tmp_path):
    stopped_at(tmp_path, 7)
    for step in (3, 6):
        flip(tmp_path / "checkpoints" / str(step) / "_CHECKPOINT_METADATA")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = r"no checkpoint in .* is whole \(3: _CHECKPOINT_METADATA is not .*, 6: .*choose another --run-dir"
    with pytest.raises(DamagedCheckpoint, match=words):
        test_loop.run(tmp_path, keep=5)
    assert {path: path.read_bytes() for path in before} == before


def test_what_was_never_a_checkpoint_is_set_aside(tmp_path, straight):
    """A directory without a seal, an empty directory and a file, all newer than the whole ones."""
    stopped_at(tmp_path, 7)
    place = tmp_path / "checkpoints"
    (place / "6" / "digests.json").unlink()
    (place / "70").mkdir()
    (place / "99").write_text("")
    test_loop.run(tmp_path, keep=5)
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"6", "70", "99"}
    assert_same(tmp_path, straight, 8)


def test_a_renamed_checkpoint_is_set_aside_and_what_has_another_name_is_left(tmp_path, straight):
    stopped_at(tmp_path, 7)
    place = tmp_path / "checkpoints"
    foreign = ["00003", "\N{ARABIC-INDIC DIGIT THREE}", "9" * 250]
    for name in foreign:
        shutil.copytree(place / "3", place / name)
    (place / "6").rename(place / "7000")
    test_loop.run(tmp_path, keep=5)
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"7000"}
    assert {path.name for path in place.iterdir()} == {*foreign, "3", "6", "8"}
    assert_same(tmp_path, straight, 8)


def test_a_damaged_predictor_is_refused_naming_the_whole_ones(tmp_path):
    """The best is asked for: another would be evaluated under its name."""
    from tests.runs import test_checkpoints as saved

    predictors = [saved.random_predictor("producer", seed=seed) for seed in range(3)]
    with Checkpoints(tmp_path / "checkpoints", keep=5, about=saved.about(predictors[0])) as made:
        for step, loss in enumerate((3.0, 1.0, 2.0)):
            made.save(step, {"module": predictors[step]}, None, loss)
    best = tmp_path / "checkpoints" / "1"
    shutil.copytree(best, tmp_path / "good")
    words = (
        rf"checkpoint 1 of {tmp_path} is damaged \(.*\); whole: step 0, 2; to use the best of them, move {best} away"
    )
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
        flip(best / name)
        with pytest.raises(ValueError, match=words):
            load_predictor(tmp_path, saved.BASE)
        other = load_predictor(tmp_path, saved.BASE, step=2)
        np.testing.assert_array_equal(other.heads.query[...], predictors[2].heads.query[...])
        shutil.rmtree(best)
        shutil.copytree(tmp_path / "good", best)
    shutil.rmtree(best)
    kept = load_predictor(tmp_path, saved.BASE)
    np.testing.assert_array_equal(kept.heads.query[...], predictors[2].heads.query[...])


# Disks


@pytest.mark.parametrize("leave", [0, 4096, 8192, 16384, 24576])
def test_a_full_disk_ends_the_run_and_loses_nothing_saved(small_disk, straight, leave):
    """It fills up when step 3 is saved for good, and step 6 is being saved: rows of metrics.jsonl, or parts of a
    checkpoint, do not fit."""
    run_dir = small_disk / "run"

    def fills(at):
        if at == 6:
            tiny_runs.fill(small_disk, leave)

    said = rf"{run_dir}.*No space left on device.*(free some|Free some) space"
    with pytest.raises(OSError, match=said) as error:
        test_loop.run(run_dir, batches=test_loop.Numbers(fills), keep=5, steps=7)
    assert "\n" not in str(error.value)
    assert checkpoints.damage(run_dir / "checkpoints" / "3") == []
    assert [row["step"] for row in rows_that_are_whole(run_dir)][:3] == [1, 2, 3]
    time.sleep(0.5)  # threads of the save that failed may still write: in a process of its own they would be gone
    with pytest.raises(OSError, match="No space left on device"):  # and still so at the next start
        test_loop.run(run_dir, keep=5, steps=7)
    assert [row["step"] for row in rows_that_are_whole(run_dir)][:3] == [1, 2, 3]
    (small_disk / "ballast").unlink()
    test_loop.run(run_dir, keep=5)
    assert_same(run_dir, straight, 8)


def rows_that_are_whole(run_dir: Path) -> list[dict]:
    found = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def test_a_save_that_fails_in_the_background_is_told_at_the_next_or_at_the_end(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    words = rf"checkpoint 3 could not be written to {tmp_path}/.*No space left on device; no checkpoint is there yet"
    monkeypatch.setattr("butler_jax.runs.digests.seal", full)
    for steps, sees in ((8, 6), (3, 3)):  # at the save of step 6; at the end
        with pytest.raises(OSError, match=words):
            test_loop.run(tmp_path / str(steps), steps=steps)
        assert len(tiny_runs.rows(tmp_path / str(steps))) == sees
        assert checkpoints.steps(tmp_path / str(steps) / "checkpoints") == []
        ended = json.loads((tmp_path / str(steps) / "run.json").read_text())[-1]["ended"]
        assert ended.startswith("OSError: checkpoint 3 could not be written")


def test_saved_is_said_when_it_is_on_disk(tmp_path, monkeypatch, capsys):
    order = []
    monkeypatch.setattr("butler_jax.runs.digests.seal", _slowly(order))
    request = test_loop.Numbers(lambda at: signal.raise_signal(signal.SIGTERM) if at == 4 else None)
    monkeypatch.setattr(
        "butler_jax.training.metrics.Metrics.say",
        lambda self, text: order.append(text.split()[0]) if "saved" in text else None,
    )
    test_loop.run(tmp_path, batches=request)
    assert order == ["sealed", "sealed", "stopped"]
    assert checkpoints.steps(tmp_path / "checkpoints") == [3, 4]


def _slowly(order: list[str]) -> Callable:
    from butler_jax.runs.digests import seal

    def sealing(*arguments):
        time.sleep(0.3)
        seal(*arguments)
        order.append("sealed")

    return sealing


def test_a_read_only_disk_is_told_before_anything_takes_long(small_disk, capfd, monkeypatch):
    monkeypatch.setattr("butler_jax.weights.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert main(["train", "--run-dir", str(small_disk / "run")]) == 1
    error = capfd.readouterr().err.splitlines()
    said = "cannot be written (Read-only file system); make it writable, or choose another directory"
    assert error == [f"error: {small_disk / 'run'} {said}"]


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_a_run_below_a_file_is_told_before_anything_takes_long(tmp_path, capfd, monkeypatch, command):
    monkeypatch.setattr("butler_jax.weights.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    tokenizer = "butler_jax.pretraining.recipe.load_or_train_tokenizer"
    monkeypatch.setattr(tokenizer, lambda *_: pytest.fail("a tokenizer was trained"))
    (tmp_path / "file").write_text("")
    assert main([command, "--run-dir", str(tmp_path / "file" / "run")]) == 1
    error = capfd.readouterr().err.splitlines()
    said = "cannot be written (Not a directory); a file is in the way: choose another directory"
    assert error == [f"error: {tmp_path / 'file' / 'run'} {said}"]


# Requests to stop


@pytest.mark.parametrize("moment", ["validation", "save"])
def test_a_request_to_stop_while_it_validates_or_saves_loses_nothing(tmp_path, straight, monkeypatch, moment):
    asked = itertools.count()

    def once():
        if next(asked) == (1 if moment == "validation" else 0):
            signal.raise_signal(signal.SIGTERM)

    def validate(module):
        if moment == "validation":
            once()  # at step 6
        return {"validation_loss": 1.0}

    def wait(self, real=Checkpoints.wait, **settings):
        if moment == "save" and self._saving == 8:  # the last
            once()
        real(self, **settings)

    monkeypatch.setattr(Checkpoints, "wait", wait)
    test_loop.run(tmp_path, validate=validate, keep=5)
    ended = json.loads((tmp_path / "run.json").read_text())[-1]
    assert (ended["ended"], ended["to"]) == (("stopped", 6) if moment == "validation" else ("finished", 8))
    monkeypatch.undo()
    test_loop.run(tmp_path, keep=5)
    rows = tiny_runs.rows(tmp_path)
    assert [row["loss"] for row in rows] == [row["loss"] for row in tiny_runs.rows(straight)]
    mine, theirs = arrays(tmp_path, 8), arrays(straight, 8)
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_a_clock_that_jumps_changes_nothing(tmp_path, straight, monkeypatch):
    """It goes back an hour at every look. Before the first save, and where the run goes on, it is a year later.

    Forward in a save is another matter: there Orbax takes the system's clock for its time limit, of five minutes.
    """
    looks, now, nanoseconds = itertools.count(step=-3600), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + next(looks))
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + next(looks) * 10**9)

    def jumps(at):
        nonlocal looks
        if at == 1:
            looks = itertools.count(31_536_000, -3600)
        if at == 7:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="the machine is gone"):
        test_loop.run(tmp_path, batches=test_loop.Numbers(jumps), keep=5)
    looks = itertools.count(63_072_000, -3600)
    test_loop.run(tmp_path, keep=5)
    assert_same(tmp_path, straight, 8)
    times = [row["seconds"] for row in (*tiny_runs.rows(tmp_path), *starts(tmp_path))]
    assert len(times) == 10 and all(0 <= seconds < 600 for seconds in times)


# Kills

MOMENTS = {
    "before the arrays": "after('mkdir', lambda path: path.name == 'state')",
    "before the seal": "before(digests, 'seal')",
    "in the seal": "at_call(digests, 'sync', 5)",
    "before the digests": "before(digests, 'write_whole')",
    "before the name": "after_call(digests, 'seal')",
    "after the name": "at_call(checkpoints, 'sync', 2)",  # one for step 3
}
OFTEN = {"before the arrays", "in the seal", "after the name"}
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
from tests.training import test_loop
from butler_jax.runs import checkpoints, digests

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def armed():
    return (Path(sys.argv[2]) / "checkpoints" / "3").exists()

def wrapped(module, name, before=None, after=None):
    real = getattr(module, name)
    def call(*arguments, **settings):
        if before and armed():
            before()
        result = real(*arguments, **settings)
        if after and armed():
            after()
        return result
    setattr(module, name, call)

def before(module, name):
    wrapped(module, name, before=die)

def after_call(module, name):
    wrapped(module, name, after=die)

def at_call(module, name, number):
    calls = []
    wrapped(module, name, before=lambda: (calls.append(0), len(calls) == number and die()))

def after(event, wanted):  # of what all of Python opens and makes
    def hook(name, arguments):
        if name == "os." + event and wanted(Path(os.fsdecode(arguments[0]))) and armed():
            die()
    sys.addaudithook(hook)

eval(sys.argv[3])
test_loop.run(Path(sys.argv[2]), keep=5)
"""


@pytest.mark.slow  # some seconds of imports for each
@pytest.mark.parametrize("moment", [moment if moment in OFTEN else long(moment) for moment in MOMENTS])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, straight, moment):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent.parent.parent), str(tmp_path), MOMENTS[moment]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    named = moment == "after the name"
    unfinished = "6.unfinished.orbax-checkpoint-tmp" if moment == "before the arrays" else "6.unfinished"
    assert left == {"3", "6" if named else unfinished}
    before = arrays(tmp_path, 3)
    assert all(before[name].tobytes() == value.tobytes() for name, value in arrays(straight, 3).items())
    assert checkpoints.damage(tmp_path / "checkpoints" / ("6" if named else "3")) == []
    test_loop.run(tmp_path, keep=5)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "6", "8"}
    assert_same(tmp_path, straight, 8)


def launch(place: dict[str, Path], cache: Path, run_dir: Path, data_dir: Path, *more: object) -> TrainingProcess:
    """`python train.py` on a tiny base, as a process of its own."""
    source = ["--base", place["base"], "--data", f"text:{place['text']}", "--data-dir", data_dir]
    rows = ["--rank", 4, "--length", 64, "--batch-size", 2, "--calibration", 1, "--mesh", "data=1"]
    steps = ["--steps", STEPS, "--checkpoint-every", EVERY, "--eval-every", 0]
    return TrainingProcess(run_dir, *source, *rows, *steps, *more, cache=cache)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict[str, Path]:
    return tiny_runs.make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory) -> TrainingProcess:
    """The run to compare with; it fills the compilation cache that the others read."""
    directory = tmp_path_factory.mktemp("undisturbed")
    training = launch(place, directory / "cache", directory / "run", directory / "data")
    assert "evaluate it with" in training.end() and training.process.returncode == 0
    return training


@pytest.mark.long
@pytest.mark.slow  # six starts of some seconds each
def test_kills_at_random_moments_change_nothing(place, undisturbed, tmp_path):
    """Five kills; benchmarks/faults.py does twenty."""
    run_dir, cache = tmp_path / "run", undisturbed.run_dir.parent / "cache"
    plan = ("start", "training", "training", "saving", "saving")
    found = faults.kill_and_resume(lambda: launch(place, cache, run_dir, tmp_path / "data"), plan=plan, every=EVERY)
    hit = found["during"]
    assert found["kills"] == sum(hit.values()) == 5 and found["checkpoints_lost"] == 0
    assert all(hit.get(phase) for phase in ("start", "training", "saving")), hit
    assert_same(run_dir, undisturbed.run_dir, STEPS)
    ended = [one["ended"] for one in starts(run_dir)]
    assert ended == [None] * (hit["training"] + hit["saving"]) + ["finished"]
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} <= {str(n) for n in range(STEPS + 1)}


class Pretended:
    """A start that goes on from its newest checkpoint, or from `start`, and writes the next; killed, or the last."""

    def __init__(self, run_dir: Path, returncode: int, start: int | None = None):
        self.run_dir, self.process, self.returncode = run_dir, self, returncode
        newest = max(checkpoints.steps(run_dir / "checkpoints"), default=0)
        (run_dir / "checkpoints" / str(newest + 1)).mkdir()
        records = [*starts(run_dir), {"from": newest if start is None else start}]
        (run_dir / "run.json").write_text(json.dumps(records))

    def kill(self) -> None: ...

    def until_it_trains(self, *_, **__) -> None: ...

    def saving(self) -> bool:
        return False

    def end(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("earlier", "damaged", "lost"), [(None, [], 0), (9, [], 1), (None, ["4", "7"], 2), (5, ["5"], 1)]
)
def test_a_checkpoint_that_a_kill_costs_is_counted(tmp_path, monkeypatch, earlier, damaged, lost):
    """`earlier`: which of the 21 starts goes on from the checkpoint before its newest."""
    monkeypatch.setattr(faults.time, "sleep", lambda _: None)
    monkeypatch.setattr(faults.checkpoints, "damage", lambda path: ["bad"] if path.name in damaged else [])
    (tmp_path / "checkpoints").mkdir()
    number = itertools.count()

    def launch():
        at = next(number)
        return Pretended(tmp_path, 0 if at == 20 else -signal.SIGKILL, at - 1 if at == earlier else None)

    found = faults.kill_and_resume(launch)
    assert (found["kills"], found["restarts"], found["checkpoints_lost"]) == (20, 20, lost)
    assert found["during"] == {"training": 20}


@pytest.mark.slow  # five starts
def test_sigterm_saves_and_exits_with_0_at_any_time(place, undisturbed, tmp_path):
    run_dir = tmp_path / "run"

    def start() -> TrainingProcess:
        """It has more steps than it will take."""
        return launch(place, undisturbed.run_dir.parent / "cache", run_dir, tmp_path / "data", "--steps", 50_000)

    for delay in (0.2, 2.5):  # it imports; it prepares the data or compiles
        training = start()
        training.until(training.catches)
        time.sleep(delay)
        training.process.terminate()
        said = training.end()
        assert training.process.returncode == 0 and "Traceback" not in said, said
        assert "run the same command again to go on" in said
    training = start()
    training.until(lambda: training.rows() > 30)
    refused = start()  # a second one in the same directory
    said = refused.end()
    assert refused.process.returncode == 1 and "Traceback" not in said
    assert f"error: {run_dir} is in use by another training, process {training.process.pid} on " in said
    shown = subprocess.run(
        [sys.executable, "-m", "butler_jax", "info", run_dir, "--json"], capture_output=True, text=True, check=True
    )
    shown = json.loads(shown.stdout)
    assert training.process.poll() is None, "it ended while it was looked at"
    assert shown["state"].startswith(f"training now (process {training.process.pid} on ") and shown["go_on"] is None
    assert all(one["state"] == "whole" for one in shown["checkpoints"])
    training.process.terminate()
    said = training.end()
    assert training.process.returncode == 0 and "Traceback" not in said, said
    step = int(said.split("stopped and saved at step ")[1].split(";")[0])
    assert max(checkpoints.steps(run_dir / "checkpoints")) == step
    assert checkpoints.damage(run_dir / "checkpoints" / str(step)) == []


@pytest.mark.long  # as a full disk, above
@pytest.mark.slow  # two starts
def test_a_file_too_large_for_the_disk_ends_the_command_in_one_line(place, undisturbed, tmp_path):
    """A limit on the size of files, which needs no mount: a checkpoint's arrays do not fit, all else does."""
    home, run_dir = undisturbed.run_dir.parent, tmp_path / "run"
    first = launch(place, home / "cache", run_dir, home / "data", "--steps", 2 * EVERY)
    assert "evaluate it with" in first.end() and first.process.returncode == 0
    training = launch(place, home / "cache", run_dir, home / "data", "--steps", 4 * EVERY)
    resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
    said = training.end()
    assert training.process.returncode == 1 and "Traceback" not in said, said
    last = said.splitlines()[-1]
    assert last.startswith(f"error: checkpoint {3 * EVERY} could not be written to {run_dir}/checkpoints: ")
    assert last.endswith(
        f"File too large; step {2 * EVERY} is safe. Free some space or mend the directory, and run the same command "
        "again to go on"
    )
    assert checkpoints.damage(run_dir / "checkpoints" / str(2 * EVERY)) == []
    load_predictor(run_dir, load_base(str(place["base"])), step=2 * EVERY)
    rows = [row["step"] for row in tiny_runs.rows(run_dir)]
    assert rows == list(range(1, len(rows) + 1)) and len(rows) >= 3 * EVERY
