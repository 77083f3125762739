"""The fuzzer finds planted faults, makes the same inputs every time, and finds no fault in a few thousand of them."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_seeds import Target
from tests.documentation.pages import REPOSITORY


def run(module, *arguments) -> str:
    """What a module prints as the main one of a process of its own: the fuzzer's alarm counts a whole process."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the fuzzer finds in functions with planted faults, by the fault's name."""
    return json.loads(run("tests.benchmarks.planted_faults", tmp_path_factory.mktemp("faults")))


def test_a_seed_decides_every_input():
    target = Target("t", (b'{"a": [1, 2], "b": "c"}', b'{"a": null}'), len)
    made = [list(fuzz.inputs(target, 200, seed)) for seed in (3, 3, 4)]
    assert made[0] == made[1] != made[2]
    assert len(made[0]) == 200 and len(set(made[0])) > 150


def test_changes_reach_every_byte_and_keep_most():
    seed = bytes(range(256))
    changed = [fuzz.mutated(random.Random(number), (seed,)) for number in range(3000)]
    reached = {at for data in changed for at in range(256) if data[at : at + 1] != seed[at : at + 1]}
    assert len(reached) == 256
    assert sum(data[:32] == seed[:32] for data in changed) > len(changed) / 3


@pytest.mark.parametrize(
    ("fault", "said"),
    {
        "bare KeyError": "KeyError",
        "recursion": "RecursionError: deep",
        "panic": "PanicException: rust",
        "unnamed": "the error does not name the file: ValueError: bad",
        "hang": "more than 0.2 s",
        "file": "files appeared",
        "memory": "memory grew by",
    }.items(),
)
def test_planted_faults_are_found(found, fault, said):
    assert [f for f in found[fault]["findings"] if f["said"].startswith(said)], found[fault]


def test_errors_that_are_documented_are_no_findings(found):
    assert found["none"]["inputs"] == 50 and found["none"]["findings"] == []


@pytest.mark.slow
def test_counts_by_coverage_and_the_others_outlive_each_other(tmp_path, monkeypatch):
    """libFuzzer ends its process with 0 where it found nothing, with 77 at an error; no other status has a meaning."""
    path, before = tmp_path / "f.json", {"runs": {"gguf": 40_000}, "findings": []}
    path.write_text(json.dumps({"atheris": before}))
    run("benchmarks.fuzz", "--json", path, "--only", "strings", "--scale", 0.001)
    report = json.loads(path.read_text())
    assert report["atheris"] == before and report["targets"]["strings"]["inputs"] == 10
    run("benchmarks.fuzz", "--json", path, "--only", "settings", "--scale", 0.001)
    report = json.loads(path.read_text())
    assert {name: found["inputs"] for name, found in report["targets"].items()} == {"strings": 10, "settings": 8}
    assert report["inputs"] == 18 and report["command"].endswith("--only strings --scale 0.001")

    monkeypatch.setattr(fuzz, "version", lambda name: "3")
    for target, status, runs in (
        ("gguf", 77, {"gguf": None}),
        ("strings", 1, {"gguf": None}),
        ("gguf", 0, {"gguf": 500}),
        ("strings", 0, {"gguf": 500, "strings": 500}),
    ):
        monkeypatch.setattr(fuzz.subprocess, "run", lambda command, status=status: SimpleNamespace(returncode=status))
        monkeypatch.setattr(sys, "argv", ["fuzz", "--json", str(path), "--atheris", target, "--runs", "500"])
        assert fuzz.main() == status
        now = json.loads(path.read_text())
        assert now["atheris"]["runs"] == runs
        assert now["atheris"]["findings"] == [name for name, count in runs.items() if count is None]
        assert {**now, "atheris": None} == {**report, "atheris": None}


@pytest.mark.long
@pytest.mark.slow
def test_thousands_of_broken_inputs_end_in_documented_errors(tmp_path):
    """One input in forty, with another seed than the report's."""
    counts = tmp_path / "counts.json"
    run("benchmarks.fuzz", "--scale", 0.025, "--seed", 7, "--json", counts)
    assert json.loads(counts.read_text())["inputs"] > 3000
