"""Finished cells are kept in a file and read back."""

from __future__ import annotations

import json
from dataclasses import asdict

from butler_jax.evaluation.cells import Cell, KeptCells
from tests.tiny_evaluations import make_row


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
