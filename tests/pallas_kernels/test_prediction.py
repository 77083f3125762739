"""The model of the time on a chip that is not there: its bytes, launches and table, and what it assumes."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from pallas_kernels.bench import benchmark
from pallas_kernels.bench.assumptions import Assumptions
from pallas_kernels.bench.cases import SHAPES, Case
from pallas_kernels.bench.chips import CHIPS
from pallas_kernels.bench.prediction import dense_seconds, predict_rows, resident_programs, shortest_gain
from pallas_kernels.bench.work import KEPT, work_of
from pallas_kernels.gpu.tiles import Tiles
from tests.marked import slow


def case(context, **changed):
    settings = dict(batch=1, tokens=context // 16, dtype=jnp.dtype(jnp.bfloat16))
    return Case(shape=SHAPES["llama8b"], context=context, **(settings | changed))


def works(one):
    return {work.launch.name: work for work in work_of(one, Tiles(), Assumptions())}


def test_bytes_and_grids_are_those_counted_by_hand():
    """Llama-3.1-8B's layer: 8 rows of 4,096 tokens, R = 16, D = 128, 256 tokens read, two bytes a number."""
    found = works(case(4096))
    assert [*found] == [
        "importance_totals",
        "importance_scores",
        "select_top_k",
        "attend_to_tokens",
        "merge_splits",
    ]
    k_imp, images = 8 * 4096 * 16 * 2, 8 * 4096 * 4
    assert found["importance_totals"].launch.grid == (8, 8)  # 512 tokens a program
    assert found["importance_totals"].streamed == k_imp + 8 * 8 * 4 * 8  # two floats a block and query head
    assert found["importance_scores"].streamed == k_imp + images
    assert found["select_top_k"].launch.grid == (8, 16)
    assert found["select_top_k"].streamed == images + 8 * 256 * 4
    assert found["attend_to_tokens"].gathered == 2 * 8 * 256 * 128 * 2
    assert found["merge_splits"].launch.programs == 32
    splits = found["attend_to_tokens"].launch.grid[1]
    assert splits > 1 and found["merge_splits"].again == 4 * 32 * splits * (128 + 2)


def test_a_call_is_one_launch_less_by_the_maximum_and_one_more_beyond_the_registers():
    assert "importance_totals" not in works(case(4096, pooling="maximum"))
    assert len(works(case(65536))) == 6 and "bracket_threshold" in works(case(65536))


def test_layers_that_choose_together_share_the_launches_of_a_choice():
    """Each has a fourth of what scores and selects, as if the rows of a batch of four chose, and of XLA's operation."""
    found = predict_rows(case(32768, together=4), CHIPS["h200"], [1])[0]
    alone, batch = (predict_rows(case(32768, batch=b), CHIPS["h200"], [1])[0] for b in (1, 4))
    assert found["launches"] == 4 / 4 + 2 and found["dense_seconds"] == alone["dense_seconds"]
    assert found["kernels"].pop("choices") > 2e-6 / 4
    for name, seconds in found["kernels"].items():
        expected = alone["kernels"][name] if name in KEPT else batch["kernels"][name] / 4
        assert seconds == pytest.approx(expected), name


def test_dense_attention_is_its_bytes_and_launches():
    """2 x 8 heads x 32,768 tokens x 128 x 2 bytes at 0.94 of 4.8 TB/s, and two launches of 2 us."""
    found = dense_seconds(case(32768), CHIPS["h200"], Assumptions())
    assert found == pytest.approx(4e-6 + 134_217_728 / (0.94 * 4.8e12))


@pytest.mark.parametrize("batch", [slow(1), 16])
def test_times_grow_with_the_context_and_with_the_bandwidth_taken_away(batch):
    contexts = [4096, 32768, 131072]
    rows = [predict_rows(case(context, batch=batch), CHIPS["h200"], [1, 8]) for context in contexts]
    for part in ("seconds", "dense_seconds", "predict_seconds"):
        for interval in (0, 1):
            times = [row[interval][part] for row in rows]
            assert times == sorted(times), part
    for first, kept in rows:
        assert kept["seconds"] < first["seconds"] and 0 < first["share_of_cap"] < 1
    slower = predict_rows(case(32768, batch=batch), CHIPS["h200"]._replace(bandwidth=10**12), [1])[0]
    assert slower["dense_seconds"] > rows[1][0]["dense_seconds"] and slower["seconds"] >= rows[1][0]["seconds"]


def test_multiprocessors_hold_as_many_programs_as_registers_allow():
    """The selection's 1,024 threads of 64 registers take all 65,536; attention's 128 threads of 120 fit four times."""
    found = works(case(32768))
    assert resident_programs(found["select_top_k"], CHIPS["h200"]) == 1
    assert resident_programs(found["attend_to_tokens"], CHIPS["h200"]) == 4


def test_the_command_prints_a_chip_that_is_not_here(tmp_path, capsys):
    path = tmp_path / "model.json"
    flags = [
        "--model",
        "h100",
        "--context",
        "4096,32768",
        "--batch",
        "16",
        "--assume",
        "launch=1.5",
        "--json",
        str(path),
    ]
    assert benchmark.main(flags) == 0
    report, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert len(report["rows"]) == 8 and report["modelled"] and report["shape"] == "llama8b"
    assert report["assumptions"]["launch"] == {"value": 1.5, "unit": "us", "source": "given"}
    assert "MODELLED, nothing was run" in printed
    assert all(name in printed for name in Assumptions().table())
    rows = [row for row in report["rows"] if row["interval"] == row["together"] == 1]
    assert (
        shortest_gain(rows) == 4096
        and "batch 16, 1 layers together, a choice every 1 steps: faster than dense from 4096" in printed
    )
    assert shortest_gain([rows[0] | {"speedup": 0.5}, rows[1]]) == 32768
    assert shortest_gain([rows[0], rows[1], rows[1] | {"speedup": 0.5}]) is None


def test_a_wrong_assumption_is_told_in_a_line(capsys):
    for wrong, message in (("lunch=3", "no assumption is called lunch"), ("launch", "give name=value")):
        with pytest.raises(SystemExit):
            benchmark.main(["--model", "h200", "--assume", wrong])
        assert message in capsys.readouterr().err
