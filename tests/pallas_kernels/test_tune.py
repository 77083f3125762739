"""The tiles of the GPU kernels: no setting changes a result, and the tuner runs on a GPU alone."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import tune
from pallas_kernels.gpu import tiles
from tests.pallas_kernels.definitions import interpreted, normal

SMALL = tiles.Tiles(
    held=64,
    candidates=128,
    select_warps=1,
    written=16,
    choosers=4,
    score_tokens=64,
    attend_bytes=1024,
    programs=6,
    least_tokens=16,
)


@pytest.mark.slow
@pytest.mark.parametrize("size", [50, 300])  # a row that is held, and one that is read in parts
@pytest.mark.parametrize("pooling", pk.checks.POOLINGS)
def test_small_tiles_give_the_references_results(size, pooling):
    arrays = dict(q=normal(0, 2, 6, 16), k=normal(1, 2, 2, size, 16), v=normal(2, 2, 2, size, 16))
    arrays |= dict(q_imp=normal(3, 2, 2, 3, 8), k_imp=normal(4, 2, 2, 8, size), lengths=jnp.array([size, size - 9]))
    how = dict(n=40, sinks=2, recent=3, pooling=pooling, return_selection=True)
    call = functools.partial(pk.sparse_decode_attention, **how)
    expected, chosen = call(**arrays, implementation="reference")
    with tiles.try_tiles(SMALL):
        own = functools.partial(call, implementation="gpu", interpret=interpreted("gpu"))
        found, selection = jax.jit(lambda arrays: own(**arrays))(arrays)
    np.testing.assert_array_equal(selection.indices, chosen.indices)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tiles_of_the_table_are_tiles(monkeypatch, tmp_path, capsys):
    for entry in json.loads(tiles.TABLE.read_text()).values():
        assert dataclasses.replace(tiles.Tiles(), **entry["tiles"])
    table = tmp_path / "tiles.json"
    table.write_text("{}")
    monkeypatch.setattr(tiles, "TABLE", table)
    device = jax.devices()[0].device_kind
    tiles.write_tiles(device, SMALL, {"jax": jax.__version__})
    assert tiles.current_tiles() == SMALL
    tiles.write_tiles("NVIDIA A100-SXM4-80GB", SMALL, {})
    assert tune.main(["--model", "a100"]) == 0  # the model prefers other tiles, but these count as measured
    assert "were measured on NVIDIA A100-SXM4-80GB: they stay" in capsys.readouterr().out
    assert tiles.tiles_of("NVIDIA A100-SXM4-80GB") == SMALL
    monkeypatch.undo()
    tiles.tiles_of.cache_clear()
    assert tiles.current_tiles() == tiles.Tiles()


@pytest.mark.slow
def test_modelled_tiles_of_the_table_are_what_the_model_finds(monkeypatch, tmp_path):
    """The grid of an A100 alone is better by the model; a measurement takes its place."""
    shipped = json.loads(tiles.TABLE.read_text())
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    tiles.TABLE.write_text("{}")
    for chip in ("a100", "b200"):
        assert tune.main(["--model", chip]) == 0
    modelled = json.loads(tiles.TABLE.read_text())
    assert [*modelled] == ["NVIDIA A100-SXM4-80GB"] and modelled["NVIDIA A100-SXM4-80GB"]["tiles"]["choosers"] == 108
    for chip, entry in shipped.items():
        assert not entry.get("modelled") or entry["tiles"] == modelled[chip]["tiles"]
    monkeypatch.undo()
    tiles.tiles_of.cache_clear()


def test_an_unknown_pooling_is_told_in_a_line(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--model", "h200", "--pooling", "mean", "--dry"])
    assert "invalid choice: 'mean'" in capsys.readouterr().err


def test_what_was_found_is_written_into_a_new_directory(tmp_path):
    tune.write_found(tmp_path / "new" / "found.json", "a chip", tiles.Tiles(), {"modelled": True})
    assert json.loads((tmp_path / "new" / "found.json").read_text())["chip"] == "a chip"


def test_the_tuner_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "the platform is cpu; run it on the chip to tune for" in capsys.readouterr().err
