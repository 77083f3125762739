"""Finished cells are kept in a file and read back."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict

import pytest

from butler_jax.evaluation.cells import Cell, KeptCells
from butler_jax.evaluation.evaluator import evaluate
from tests import tiny_runs
from tests.tiny_evaluations import make_perplexity_evaluation, make_row
from tests.tiny_models import make_model


def test_a_kept_cell_is_read_back_whole(tmp_path):
    cell = Cell([make_row(where={"depth": 0.5}), make_row(budget=None, error=0.5)], {"map": [[1.0]]}, seconds=10.0)
    kept = KeptCells(tmp_path)
    kept.add("k", cell)
    assert KeptCells(tmp_path).cells == {"k": cell}


def test_damaged_cells_are_measured_anew_and_whole_ones_kept(tmp_path):
    row = asdict(make_row())
    good = {"key": "good", "rows": [row], "arrays": {}, "seconds": 1.0}
    fewer = {name: value for name, value in row.items() if name != "sequences"}
    wrong = [5, {**row, "value": "abc"}, {**row, "n": "3"}, fewer, {**row, "more": 1}, {**row, "metric": None}]
    bad = [{**good, "rows": []}, {**good, "arrays": []}, {**good, "key": 5}]
    bad += [{**good, "seconds": seconds} for seconds in ("1", 10**400)]
    bad += [{**good, "rows": [one]} for one in wrong]
    lines = [json.dumps({**one, "key": "bad"} if one["key"] != 5 else one).encode() for one in bad]
    lines += [b"\xff\xfe", b"[" * 200_000, b"null", b'{"key": "bad"', json.dumps(good).encode()]
    (tmp_path / "cells.jsonl").write_bytes(b"\n".join(lines))
    assert list(KeptCells(tmp_path).cells) == ["good"]


def test_evaluations_at_the_same_time_lose_no_cell(tmp_path):
    """Lines beyond the size that the system writes at once, by four that each opened the file before any was added."""
    row, kept = make_row(), [KeptCells(tmp_path) for _ in range(4)]

    def add(number: int) -> None:
        for index in range(8):
            values = [[float(number)] * 20_000, [float(index)] * 20_000]
            kept[number].add(f"{number} {index}", Cell([row], {"map": values}, seconds=1.0))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept[0].refresh()
    found = KeptCells(tmp_path).cells
    assert len(found) == 32 and kept[0].cells == found
    for key, cell in found.items():
        assert " ".join(f"{values[0]:.0f}" for values in cell.arrays["map"]) == key
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 32


@pytest.fixture
def place(tmp_path):
    return make_perplexity_evaluation(make_model(), tmp_path)


def test_a_full_disk_ends_an_evaluation_and_loses_no_cell(place, small_disk):
    base, predictor, config = place
    file, said = small_disk / "out" / "cells.jsonl", []

    def fill(line):
        said.append(line)
        if line.startswith("[2/5]"):
            with file.open("a") as cells:  # all but the last hundred bytes of a page
                cells.write("x" * ((-file.stat().st_size - 101) % 4096) + "\n")
            tiny_runs.fill(small_disk, 0)

    words = rf"{file} cannot be written \(No space left on device\); free some space there"
    with pytest.raises(OSError, match=words):
        evaluate(base, predictor, config, keep=file.parent, say=fill)
    assert said[-1].startswith("[2/5]")
    (small_disk / "ballast").unlink()
    report = evaluate(base, predictor, config, keep=file.parent)
    assert report.about["cells"] == {"measured": 3, "kept": 2}
    assert report.rows == evaluate(base, predictor, config).rows


def test_a_cell_that_another_evaluation_has_measured_meanwhile_is_not_measured(place, tmp_path):
    base, predictor, config = place
    first = evaluate(base, predictor, config, keep=tmp_path / "first")

    def other(line):
        if line.startswith("[1/5]"):
            with (tmp_path / "out" / "cells.jsonl").open("a") as cells:
                cells.write("".join((tmp_path / "first" / "cells.jsonl").read_text().splitlines(True)[1:4]))

    report = evaluate(base, predictor, config, keep=tmp_path / "out", say=other)
    assert report.about["cells"] == {"measured": 2, "kept": 3} and report.rows == first.rows
