"""The fuzzer finds planted faults, makes the same inputs every time, and finds no fault in a few thousand of them."""

import gc
import json
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_seeds import Target
from tests.documentation.pages import REPOSITORY


@pytest.fixture
def alarm():
    """The alarm that ends an input which takes too long. Garbage of other tests, collected then, would be its time."""
    before = signal.signal(signal.SIGPROF, fuzz.alarm)
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGPROF, before)


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


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda data, directory: {}["k"], "KeyError"),
        (lambda data, directory: _raise(RecursionError("deep")), "RecursionError: deep"),
        (lambda data, directory: _raise(type("PanicException", (BaseException,), {})("rust")), "PanicException: rust"),
        (lambda data, directory: _raise(ValueError("bad")), "the error does not name the file: ValueError: bad"),
        (lambda data, directory: all(n == 0 for n in iter(int, 1)), "more than 0.2 s"),
        (lambda data, directory: (directory / str(len(data))).touch(), "files appeared"),
        (lambda data, directory: len(bytes(64 << 20).replace(b"\0", b"1")), "memory grew by"),
    ],
    ids=["bare KeyError", "recursion", "panic", "unnamed", "hang", "file", "memory"],
)
def test_planted_faults_are_found(tmp_path, monkeypatch, alarm, fault, said):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "GROWTH", 32 << 20)
    if said == "memory grew by":  # the peak of this process may be higher than what the fault takes
        peaks = iter(range(0, 1 << 40, 64 << 20))
        monkeypatch.setattr(fuzz, "peak", lambda: next(peaks))
        fault = lambda data, directory: None  # noqa: E731
    seed = b'{"a": 1}'
    found = fuzz.fuzz(Target("t", (seed,), lambda data: data == seed or fault(data, tmp_path)), 6, 0, tmp_path)
    assert [f for f in found["findings"] if f["said"].startswith(said)], found


@pytest.mark.slow
def test_counts_by_coverage_and_the_others_outlive_each_other(tmp_path, monkeypatch, alarm):
    """libFuzzer ends its process with 0 where it found nothing, with 77 at an error; no other status has a meaning."""
    path, before = tmp_path / "f.json", {"runs": {"gguf": 40_000}, "findings": []}
    path.write_text(json.dumps({"atheris": before}))
    monkeypatch.setattr(sys, "argv", ["fuzz", "--json", str(path), "--only", "strings", "--scale", "0.001"])
    assert fuzz.main() == 0
    report = json.loads(path.read_text())
    assert report["atheris"] == before and report["targets"]["strings"]["inputs"] == 10
    monkeypatch.setattr(sys, "argv", ["fuzz", "--json", str(path), "--only", "settings", "--scale", "0.001"])
    assert fuzz.main() == 0
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


def test_errors_that_are_documented_are_no_findings(tmp_path, alarm):
    seed = b'{"a": 1}'
    target = Target("t", (seed,), lambda data: data == seed or _raise(FileNotFoundError(f"{tmp_path}/x is missing")))
    found = fuzz.fuzz(target, 50, 0, tmp_path)
    assert found["inputs"] == 50 and found["findings"] == []


@pytest.mark.long
@pytest.mark.slow
def test_thousands_of_broken_inputs_end_in_documented_errors(tmp_path):
    """One input in forty, with another seed than the report's. Its alarm counts all threads of its process."""
    counts = tmp_path / "counts.json"
    command = [sys.executable, "-m", "benchmarks.fuzz", "--scale", "0.025", "--seed", "7", "--json", str(counts)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    assert json.loads(counts.read_text())["inputs"] > 3000
