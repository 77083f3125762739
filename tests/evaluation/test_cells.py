"""Kept cells: damaged ones are measured anew."""

import json

from butler_jax.evaluation.cells import Kept


def test_damaged_cells_are_measured_anew_and_whole_ones_kept(tmp_path):
    estimate = [1.5, None, 3, 2]
    finding = {"metric": "m", "estimate": estimate, "budget": 0.5, "attended": 0.5, "where": {}}
    good = {"key": "good", "findings": [finding], "arrays": {}, "seconds": 1.0}
    bad = [
        {**good, "findings": []}, {**good, "findings": [5]}, {**good, "seconds": "1"}, {**good, "seconds": 10**400},
        {**good, "arrays": []},
        {**good, "key": 5}, {**good, "findings": [{**finding, "estimate": "abc"}]},
        {**good, "findings": [{**finding, "estimate": ["1", None, 3, 2]}]},
        {**good, "findings": [{**finding, "estimate": estimate[:3]}]},
        {**good, "findings": [{**finding, "more": 1}]}, {**good, "findings": [{**finding, "metric": None}]},
    ]  # fmt: skip
    lines = [json.dumps({**one, "key": "bad"} if one["key"] != 5 else one).encode() for one in bad]
    lines += [b"\xff\xfe", b"[" * 200_000, b"null", b'{"key": "bad"', json.dumps(good).encode()]
    (tmp_path / "cells.jsonl").write_bytes(b"\n".join(lines))
    assert list(Kept(tmp_path).cells) == ["good"]
