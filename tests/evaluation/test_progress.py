"""Lines of progress estimate the time left."""

from __future__ import annotations

from butler_jax.evaluation.cells import Cell
from butler_jax.evaluation.progress import CellProgress, format_duration
from tests.tiny_evaluations import make_row


def test_the_time_left_is_that_of_cells_alike():
    said = []
    progress = CellProgress({"a": 3, "b": 1}, 5, said.append)
    cell = Cell([make_row(value=2.0)], seconds=10.0)
    progress.add("a", "oracle", cell, kept=False)
    assert progress.seconds_left() == 2 * 10 + 10
    progress.add("b", "oracle", Cell(cell.rows, seconds=100.0), kept=True)  # one more is to be measured
    assert progress.seconds_left() == 2 * 10 + 100
    shared = CellProgress({"a": 3, "b": 1}, 5, said.append, hosts=2)
    shared.add("a", "oracle", cell, kept=False)
    assert shared.seconds_left() == (2 * 10 + 10) / 2
    assert said[0].startswith("[1/5] a") and said[0].endswith("10 s, about 30 s left")
    for label in ("oracle", "oracle", "dense"):
        shared.begin("a", label)
    assert said[-2:] == ["compiling a under oracle", "compiling a under dense"]
    assert [format_duration(s) for s in (40, 720, 11100)] == ["40 s", "12 min", "3 h 5 min"]
