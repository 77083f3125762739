"""The script for a machine with a GPU: its limits, its records, its summary, and a small run on CPU."""

from __future__ import annotations

import json
import os
import sys

import pytest

from benchmarks import gpu

XML = """<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two"><skipped/>
</testcase><testcase classname="b" name="three"><failure message="no"/></testcase></testsuite></testsuites>"""


def part(name, program, result=lambda: None):
    return gpu.GpuPart(name=name, minutes=1, command=[sys.executable, "-S", "-c", program], result=result)


@pytest.mark.parametrize("bases", [["tiny"], ["x/SmolLM2-135M", "y/Qwen2.5-0.5B", "z/Qwen2.5-0.5B"]])
def test_the_parts_take_25_minutes_at_most_and_have_names_of_their_own(bases, tmp_path):
    parts = gpu.make_parts(tmp_path, bases, False)
    assert sum(part.minutes for part in parts) == pytest.approx(gpu.TOTAL)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names) == 6 + 2 * len(bases)
    assert [part.name for part in gpu.make_parts(tmp_path, bases, True)] == names


def test_every_part_leaves_a_record_whatever_becomes_of_it(tmp_path):
    written = tmp_path / "found.json"
    programs = {
        "good": (f"open({str(written)!r}, 'w').write('[7]')", "ok", [7]),
        "bad": ("print('why'); raise SystemExit(3)", "failed with 3", None),
        "long": (f"open({str(written)!r}, 'w').write('[8]'); import time; time.sleep(60)", "cut off", [8]),
    }
    for name, (program, status, result) in programs.items():
        written.unlink(missing_ok=True)
        seconds = 1.0 if name == "long" else 30
        one = part(name, program, lambda: gpu.read_json(written))
        record = gpu.run_part(one, tmp_path, seconds, dict(os.environ))
        assert record == json.loads((tmp_path / f"{name}.json").read_text())
        assert (record["status"], record["result"]) == (status, result)
    assert json.loads((tmp_path / "bad.json").read_text())["tail"] == ["why"]


def test_results_of_tests_and_trainings_are_read(tmp_path):
    (tmp_path / "tests.xml").write_text(XML)
    assert gpu.read_tests(tmp_path / "tests.xml") == {"passed": 1, "skipped": 1, "failed": ["b::three"]}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert gpu.read_training(tmp_path)["last"] == {"step": 2, "loss": 1.0}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert gpu.read_training(tmp_path)["rows"] == 2
    for nothing in (gpu.read_tests, gpu.read_json, gpu.read_training):
        assert nothing(tmp_path / "absent") is None


def test_measured_times_are_beside_modelled_ones_of_the_same_chip():
    report = json.loads((gpu.REPOSITORY / "benchmarks" / "h200" / "sparse_decode_normalised.json").read_text())
    row, _ = gpu.compare_bench(report)
    assert row["seconds"]["measured"] == report["rows"][0]["seconds"]
    assert 0 < row["seconds"]["modelled"] < row["seconds"]["measured"]
    assert gpu.compare_bench(report | {"device": "another"}) == []


def test_the_commands_are_printed_without_running(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out"), "--dry"]) == 0
    assert "25.0 minutes in all, at most" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_run_on_cpu_writes_every_record_and_goes_on_where_it_was(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--tiny", "--parts", "device", "kernels", "flashinfer", "bench"]
    assert gpu.main(flags) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert summary["device"]["result"]["platform"] == "cpu"
    assert summary["kernels"]["result"] == {"passed": 1, "skipped": 0, "failed": []}
    assert [row["interval"] for row in summary["bench"]["result"]["rows"]] == [1, 8]
    assert summary["tune"]["status"] == "not begun"
    capsys.readouterr()
    assert gpu.main(flags) == 0
    assert "device: ok" not in capsys.readouterr().out  # nothing ran again
