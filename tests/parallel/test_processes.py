"""Several real processes on the loopback address against one: training, stopping, dying, going on, and evaluating."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest

from butler_jax import load_base
from butler_jax.runs.directory import claim
from tests import tiny_runs
from tests.host_devices import host_devices
from tests.host_processes import STEPS, Ended, Place, Signal, free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(place) -> list[float]:
    """The losses of one process that nothing disturbs."""
    place.finish(1, place.train("alone", "--keep", STEPS))
    losses = place.losses("alone")
    assert len(losses) == STEPS
    return losses


def same(losses: list[float], alone: list[float]) -> None:
    """Sums over processes come in another order: float32 rounding, grown by twelve steps of training."""
    assert losses == pytest.approx(alone[: len(losses)], abs=1e-5)


class Death(NamedTuple):
    """A process died: which one, how all ended, and what was on disk then."""

    index: int
    ended: list[Ended]
    losses: list[float]
    kept: list[int]


@pytest.fixture(scope="module")
def deaths(place) -> list[Death]:
    """A start of a run `four` of four processes, and one of its copy `two` by two; in each a process kills itself."""
    # Four at once prepare the data. The third dies when checkpoint 4 is there and 6 is being written; started again,
    # the first does, at which the other looks for it.
    more, found = ("--data-dir", place.directory / "another"), []
    written = place.directory / "four" / "checkpoints" / "4"
    ended = place.run(4, place.train("four", *more), signals={2: Signal(signal.SIGKILL, 7, written)})
    found.append(Death(2, ended, place.losses("four"), place.kept("four")))
    place.copy("four", "two")
    command = place.train("two", *more, "--mesh", "model=2")
    ended = place.run(2, command, signals={0: Signal(signal.SIGKILL, 3, place.directory)})
    found.append(Death(0, ended, place.losses("two"), place.kept("two")))
    return found


def test_processes_end_when_one_dies_and_go_on_at_the_next_start(deaths, alone):
    for index, ended, losses, kept in deaths:
        same(losses, alone)
        assert kept
        assert ended[index].status == -signal.SIGKILL
        for one in (*ended[:index], *ended[index + 1 :]):
            assert one.status != 0 and one.at - ended[index].at < 60, one
            ours = "lost another one" in one.said and "start the same command on every host again" in one.said
            assert ours or "another task died" in one.said, one.said[-3000:]  # the latter is JAX's
    first, second = deaths
    assert len(first.losses) in (5, 6) and first.kept[-1] in (4, 6)  # the last step may not have been written down
    assert f"going on from step {first.kept[-1]}" in second.ended[0].said
    assert len(second.losses) > first.kept[-1]


@pytest.mark.long  # as the second start of `deaths`, up to the end
@pytest.mark.parametrize(("count", "mesh"), [(1, ""), (2, "model=2")])
def test_checkpoints_of_four_processes_go_on_in_fewer(place, deaths, alone, count, mesh):
    run, last = f"four-{count}", deaths[0].kept[-1]
    place.copy("four", run)
    ended = place.finish(count, place.train(run, "--mesh", mesh))
    assert f"going on from step {last}" in ended[0].said
    assert not any("step" in one.said for one in ended[1:])  # the first process speaks
    assert len(place.losses(run)) == STEPS
    same(place.losses(run), alone)


def test_a_run_goes_on_in_more_processes_which_stop_at_one_step(place, alone):
    place.copy("alone", "stopped", step=4)
    asked = Signal(signal.SIGTERM, 2, place.directory)  # before step 6, the second process alone
    ended = place.finish(2, place.train("stopped"), signals={1: asked})
    assert "going on from step 4" in ended[0].said
    last = place.kept("stopped")[-1]
    assert last in (5, 6)  # the first process may hear of it while it still compiles step 5
    assert f"stopped and saved at step {last}; run the same command again to go on" in ended[0].said
    assert len(place.losses("stopped")) == last
    ended = place.finish(1, place.train("stopped"))
    assert f"going on from step {last}" in ended[0].said
    assert len(place.losses("stopped")) == STEPS
    same(place.losses("stopped"), alone)


class Evaluated(NamedTuple):
    """What an evaluation left: the rows of its report, and the keys of its cells."""

    rows: list[dict]
    cells: list[str]


def read_evaluation(out) -> Evaluated:
    cells = [json.loads(line)["key"] for line in (out / "cells.jsonl").open()]
    return Evaluated(json.loads((out / "report.json").read_text())["rows"], cells)


@pytest.fixture(scope="module")
def evaluated(place, deaths) -> Evaluated:
    """What four processes saved, evaluated by one."""
    out = place.directory / "evaluated" / "one"
    place.finish(1, place.evaluate("four", "--out", out))
    found = read_evaluation(out)
    assert len(found.rows) > 20 and len(found.cells) == len(set(found.cells)) > 5
    return found


def test_two_processes_evaluate_like_one(place, evaluated):
    """Each computes whole cells, as it would alone."""
    out = place.directory / "evaluated" / "two"
    first, second = place.finish(2, place.evaluate("four", "--out", out))
    found = read_evaluation(out)
    assert found.rows == evaluated.rows and sorted(found.cells) == sorted(evaluated.cells)
    assert first.said.count("perplexity   dense") == 1 and "the report is in" in first.said
    assert "perplexity " not in second.said
    (again,) = place.finish(1, place.evaluate("four", "--out", out))
    assert again.said.count("kept") == len(evaluated.cells)


@pytest.mark.parametrize("mesh", ["data=2", "model=2", "sequence=2"])
def test_two_processes_evaluate_on_a_mesh_like_one(place, evaluated, mesh):
    """Both compute every cell."""
    out = place.directory / "evaluated" / mesh
    place.finish(2, place.evaluate("four", "--mesh", mesh, "--out", out))
    found = read_evaluation(out)
    values = [row["value"] for row in evaluated.rows]
    assert [row["value"] for row in found.rows] == pytest.approx(values, rel=1e-5, abs=1e-5)
    assert sorted(found.cells) == sorted(evaluated.cells)


def test_two_evaluations_of_one_run_at_the_same_time(place, evaluated):
    """They write into one directory, and each takes over what the other has finished."""
    out = place.directory / "evaluated" / "both"
    with ThreadPoolExecutor(2) as pool:
        ended = pool.map(lambda _: place.finish(1, place.evaluate("four", "--out", out)), range(2))
        assert all("the report is in" in one.said for (one,) in ended)
    found = read_evaluation(out)
    assert found.rows == evaluated.rows and {*found.cells} == {*evaluated.cells}


def test_other_settings_are_named_by_all(place):
    ended = place.run(2, place.train("settings"), more={1: ["--seed", "3", "--length", "16"]})
    for one in ended:
        line = one.said.splitlines()[-1]
        assert one.status == 1 and line.startswith("error: the processes of this run differ")
        assert "length: 32 in process 0; 16 in process 1" in line and "seed: 0 in process 0; 3 in process 1" in line
    assert not (place.directory / "settings").exists()


def test_other_numbers_of_devices_are_named_by_all(place):
    devices = {1: {"XLA_FLAGS": host_devices(2)}}
    for one in place.run(2, place.train("devices"), environments=devices):
        assert one.status == 1 and "there are 1 in process 0, 2 in process 1" in one.said.splitlines()[-1]


def test_others_that_never_come_are_waited_for_so_long(place):
    for index in (0, 1):
        address = f"127.0.0.1:{free_port()}"
        line = place.train("waiting", "--distributed", f"{address},2,{index}", "--start-timeout", "2")
        (one,) = place.run(1, line)
        last = one.said.splitlines()[-1]
        assert one.status == 1 and f"error: process {index} waited 2 s at {address} for the 2 processes" in last
        assert f"{address} is process 0's and can be reached" in last


def test_a_run_in_use_is_told_by_all(place):
    with claim(place.directory / "used"):
        for one in place.run(2, place.train("used")):
            assert one.status == 1 and "is in use by another training" in one.said.splitlines()[-1]


def test_an_error_of_one_process_ends_all_in_a_line(place):
    """The first alone writes metrics."""
    (place.directory / "blocked" / "metrics.jsonl").mkdir(parents=True)
    first, second = place.run(2, place.train("blocked"))
    assert (first.status, second.status) == (1, 1)
    assert "metrics.jsonl" in first.said.splitlines()[-1] and first.said.splitlines()[-1].startswith("error: ")
    assert "error: process 1 lost another one, which ended or cannot be reached" in second.said


@pytest.mark.long  # an error of one process, above, ends all alike
def test_a_full_disk_ends_all_in_a_line(place, small_disk):
    """Each writes its own part of a checkpoint."""
    tiny_runs.fill(small_disk, 40960)
    ended = place.run(2, place.train(small_disk / "run"))
    for one in ended:
        assert one.status == 1 and any(line.startswith("error: ") for line in one.said.splitlines()), one.said[-2000:]
    assert any("No space left on device" in one.said for one in ended)


CHECKS = """
import json, sys
from pathlib import Path
import jax
import numpy as np
from butler_jax.cli.command_line import read
from butler_jax.training.config import TrainConfig
from butler_jax.parallel.hosts import agree, check_shared, gather, join_hosts
from butler_jax.parallel.mesh import make_mesh, on_host, own_rows, place_batch, rows_here

join_hosts(read(TrainConfig, sys.argv[1:], "checks"))
index = jax.process_index()

def refusal(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (ValueError, OSError) as error:
        return str(error)

def rows(mesh):
    mesh, batch = make_mesh(mesh), {"x": np.arange(8 * 3).reshape(8, 3)}
    there = on_host(place_batch(own_rows(batch, mesh), mesh)["x"])
    return rows_here(8, mesh) if (there == batch["x"]).all() else None

Path("file").touch()
found = {
    "gathered": gather({"index": index, "text": "x" * 3000 * index}),
    "agreed": refusal(agree, {"same": [1, None], "other": index}),
    "shared": refusal(check_shared, Path("together")),
    "apart": refusal(check_shared, Path(f"apart{index}") / "run", seconds=0.5),
    "unwritable": refusal(check_shared, Path("file") / "run"),
    "idle": refusal(make_mesh, "data=2"),
    "batch": refusal(make_mesh, "", batch_size=6),
    "rows": {mesh: rows(mesh) for mesh in ("data=4", "data=2,model=2", "model=4")},
}
print(json.dumps(found))
"""


def test_processes_agree_on_everything_that_is_wrong(place):
    (place.directory / "checks.py").write_text(CHECKS)
    two = {"XLA_FLAGS": host_devices(2)}
    ended = place.finish(2, [str(place.directory / "checks.py")], environments={0: two, 1: two})
    found = [json.loads(one.said.splitlines()[-1]) for one in ended]
    rows, paths = ([one.pop(name) for one in found] for name in ("rows", "apart"))
    assert found[0] == found[1]
    (found, _) = found
    assert found["gathered"] == [{"index": 0, "text": ""}, {"index": 1, "text": "x" * 3000}]
    assert "differ (other: 0 in process 0; 1 in process 1); start the same command" in found["agreed"]
    assert found["shared"] is None and not (place.directory / "together").exists()
    for index, path in enumerate(paths):
        assert f"process 1 does not see in apart{index}/run what process 0 writes there" in path
    assert not list(place.directory.glob("apart*"))
    assert "file" in found["unwritable"]
    assert "mesh 'data=2' takes 2 of the 4 devices of 2 processes" in found["idle"]
    assert "batch size 6 is not divisible by the mesh's data axis (4); use a multiple of 4" in found["batch"]
    first, second, every = [0, 1, 2, 3], [4, 5, 6, 7], list(range(8))
    halves = {"data=4": (first, second), "data=2,model=2": (first, second), "model=4": (every, every)}
    assert rows == [{mesh: parts[index] for mesh, parts in halves.items()} for index in range(2)]


@pytest.mark.long
def test_two_processes_pretrain_like_one(place):
    sizes = "--steps 6 --long-steps 2 --checkpoint-every 10 --batch-size 8 --length 32 --context 64 --vocab-size 280"
    sizes += " --width 32 --hidden 32 --layers 2 --heads 2 --kv-heads 1 --head-dim 16 --eval-every 0"
    text, data_dir = place.files["text"], place.files["data_dir"]
    command = ["train.py", "pretrain", *sizes.split(), "--data", f"text:{text}", "--data-dir", str(data_dir)]
    for count in (1, 2):
        ended = place.finish(count, [*command, "--run-dir", str(place.directory / f"base{count}")])
        assert sum("the model is in" in one.said for one in ended) == 1
    same(place.losses("base2"), place.losses("base1"))
    cards = [json.loads((place.directory / f"base{count}" / "model" / "card.json").read_text()) for count in (1, 2)]
    assert cards[1]["losses"] == pytest.approx(cards[0]["losses"], abs=1e-5)  # as above
    weights = [load_base(str(place.directory / f"base{count}" / "model")).model for count in (1, 2)]
    one, two = (np.asarray(model.layers.q[...], np.float32) for model in weights)
    # Kept in bfloat16: two numbers that differ by float32 rounding may be neighbours there.
    np.testing.assert_allclose(one, two, rtol=2**-7, atol=1e-4)
