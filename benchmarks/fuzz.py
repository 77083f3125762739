"""Broken and hostile inputs for every function that reads files and texts from elsewhere.

    python -m benchmarks.fuzz --json benchmarks/fuzz.json

An input is a valid one that was changed: bytes are flipped, cut or doubled, numbers become extreme, and pieces of other
formats are inserted. For JSON, hypothesis also replaces values of an object. The seed determines every input.

A finding is one of these: an exception other than ValueError and FileNotFoundError, an error that does not name its
file, an input that takes more than SECONDS of computing, a file that is written, or memory that grows by more than
GROWTH.

`--atheris TARGET` lets atheris (libFuzzer, where it is installed) search for inputs by coverage; it ends at the first
finding. With --json it runs in a process of its own. The number of inputs without a finding (null after a finding) is
then stored beside the other counts, which are kept.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import inspect
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from benchmarks.fuzz_seeds import ALLOWED, Target
from benchmarks.fuzz_targets import targets
from benchmarks.watch import memory_mib

SECONDS = 5.0  # of computing, so that other work of the machine is no finding
GROWTH = 512 << 20
COUNTS = {  # inputs of each target
    "safetensors": 15000,
    "index": 8000,
    "gguf": 10000,
    "config.json": 15000,
    "tokenizer.json": 10000,
    "tokenizer_config.json": 8000,
    "samples.jsonl": 10000,
    "text.jsonl": 25000,
    "text files": 10000,
    "tables": 25000,
    "run config": 8000,
    "settings": 8000,
    "cells.jsonl": 8000,
    "strings": 10000,
    "prompts": 8000,
    "load_base": 1000,
    "run directory": 5000,
    "chat template": 25000,
    "generation_config": 25000,
    "predictor": 3000,
    "hub": 2000,
}
JSON_SHARE = 0.25  # of a JSON target's inputs, made by hypothesis
PIECES = (
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"-1",
    b"0",
    b"2147483648",
    b"10000000000",
    b"9" * 5000,
    b"null",
    b"true",
    b'"x"',
    b'""',
    b"[]",
    b"{}",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xff\xfe",
    b"\0",
    b"../",
    b"/etc/passwd",
    b"\n",
    b",",
    b'"',
    b"}",
    b"]",
    b"a" * 70000,
    b"GGUF",
    b"model.safetensors",
    b"F8_E4M3",
    b"1/0",
    b"\xef\xbb\xbf",
)
ENDS = (0, 70, 71, 77)  # libFuzzer's statuses: nothing found, too long, too much memory, an error
NUMBERS = (0, 1, 2, 127, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(random: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    """One of the seeds after one to six changes."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        at, kind = random.randint(0, len(data)), random.randrange(9)
        end = min(len(data), at + random.choice((1, 2, 4, 8, 40)))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = random.randrange(256)
        elif kind == 2:
            size = random.choice((4, 8))
            data[at : at + size] = (random.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        elif kind == 3:
            data[at:at] = random.choice(PIECES)
        elif kind == 4:
            data[at:end] = random.choice(PIECES)
        elif kind == 5:
            del data[at:end]
        elif kind == 6:
            data[at:at] = data[at:end] * random.choice((1, 2, 50))
        elif kind == 7:
            other = random.choice(seeds)
            data[at:] = other[random.randint(0, len(other)) :]
        else:
            digits = [i for i, byte in enumerate(data[:4000]) if 48 <= byte < 58]
            if digits:
                at = random.choice(digits)
                data[at : at + 1] = str(random.choice(NUMBERS)).encode()
    return bytes(data)


EXTREME = st.sampled_from([*NUMBERS, -1, 10**400, "../x"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), EXTREME),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def replaced(draw: Callable, value: Any) -> Any:
    """A JSON value of which one part is replaced, removed or renamed."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    new, key = value.copy(), draw(st.sampled_from(keys))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        del new[key]
    elif kind == 1 and isinstance(value, dict):
        new[draw(st.text(max_size=8))] = draw(VALUES)
    else:
        new[key] = draw(replaced(value[key]))
    return new


def json_inputs(target: Target, count: int, seed: int) -> list[bytes]:
    """`count` inputs from hypothesis: in one line of a seed, parts of the object are replaced; earlier lines stay."""
    made: list[bytes] = []
    parsed: list[tuple[bytes, Any]] = []
    for text in target.seeds:
        front = text[: re.search(rb"[{\[]", text).start()]
        parsed.append((front, json.loads(text[len(front) :].split(b"\n")[0])))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.sampled_from(range(len(parsed))).flatmap(
            lambda at: st.tuples(st.just(parsed[at][0]), replaced(parsed[at][1]))
        )
    )
    def collect(one: tuple[bytes, Any]) -> None:
        made.append(one[0] + json.dumps(one[1]).encode())

    collect()
    return made


def inputs(target: Target, count: int, seed: int) -> Iterator[bytes]:
    """The inputs of a target; the seed determines them."""
    is_json = all(re.match(rb".?[{\[]", s, re.DOTALL) for s in target.seeds)
    made = json_inputs(target, max(1, int(count * JSON_SHARE)), seed) if is_json else []
    yield from made
    source = random.Random(f"{seed} {target.name}")
    for _ in range(count - len(made)):
        yield mutated(source, target.seeds)


class TooLong(BaseException):
    """An input took more than SECONDS of computing."""


def alarm(*_: Any) -> None:
    """Interrupt a target that takes too long."""
    raise TooLong


def complaint(target: Target, data: bytes, directory: Path) -> str | None:
    """What a target did wrong on an input, in words; None where it did nothing wrong."""
    try:
        target.run(data)
    except ALLOWED as error:
        if target.named and str(directory) not in str(error):
            return f"the error does not name the file: {type(error).__name__}: {str(error)[:200]}"
    except TooLong:
        return f"more than {SECONDS:g} s"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def files(directory: Path) -> list[str]:
    """The names of everything below a directory."""
    return sorted(str(path) for path in directory.rglob("*"))


def fuzz(target: Target, count: int, seed: int, directory: Path) -> dict[str, Any]:
    """Run a target on `count` inputs. Returns counts, seconds and the findings, each kind once with its input."""
    for one in target.seeds:
        target.run(one)  # what is valid is taken
    findings: dict[str, dict] = {}
    longest, there, before = 0.0, files(directory), peak()
    began = time.process_time()
    done = 0
    for data in inputs(target, count, seed):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        faulthandler.dump_traceback_later(100 * SECONDS, exit=True)  # where not even the alarm is heard
        start = time.process_time()
        try:
            said = complaint(target, data, directory)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        longest, done = max(longest, time.process_time() - start), done + 1
        if said is None and peak() - before > GROWTH:
            said, before = f"memory grew by {(peak() - before) >> 20} MiB", peak()
        if said is not None:
            kind = said.split(":")[0]
            findings.setdefault(kind, {"said": said, "times": 0, "bytes": data[:2000].decode("latin1")})["times"] += 1
    faulthandler.cancel_dump_traceback_later()
    if files(directory) != there:
        findings["files"] = {"said": f"files appeared: {sorted(set(files(directory)) - set(there))[:5]}", "times": 1}
    return {
        "inputs": done,
        "seconds": round(time.process_time() - began, 1),
        "longest_ms": round(1000 * longest, 1),
        "findings": list(findings.values()),
    }


def peak() -> int:
    """The process's peak resident memory in bytes. getrusage counts that of the process which started this one too."""
    return int(memory_mib(trim=False)[1] * 2**20)


def by_coverage(target: Target, runs: int, seed: int, directory: Path) -> None:
    """Fuzz with atheris, which ends the process itself; a finding is an error."""
    import atheris

    def one(data: bytes) -> None:
        said = complaint(target, data, directory)
        if said is not None:
            raise AssertionError(said)

    for module in [m for name, m in sys.modules.items() if name.split(".")[0] in ("butler_jax", "gguf", "json")]:
        classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        for function in [f for owner in (module, *classes) for f in vars(owner).values() if inspect.isfunction(f)]:
            if function.__module__ == module.__name__:
                atheris.instrument_func(function)
    corpus = directory / "corpus"
    corpus.mkdir()
    for at, data in enumerate(target.seeds):
        (corpus / str(at)).write_bytes(data)
    options = {"runs": runs, "seed": seed + 1, "timeout": int(SECONDS), "artifact_prefix": f"{tempfile.gettempdir()}/"}
    atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)], one)
    atheris.Fuzz()


def note_coverage(path: Path, target: str, runs: int, seed: int) -> int:
    """Fuzz with atheris in a process of its own and add its result to the JSON file. Returns the process's status."""
    own = ["--atheris", target, "--runs", str(runs), "--seed", str(seed)]
    status = subprocess.run([sys.executable, "-m", "benchmarks.fuzz", *own]).returncode
    if status in ENDS:
        report = kept(path)
        before = report.get("atheris", {})
        found = {*(before.get("findings") or ()), target} - ({target} if status == 0 else set())
        report["atheris"] = {
            "command": "python -m benchmarks.fuzz --atheris TARGET --runs RUNS --json FILE",
            "date": datetime.date.today().isoformat(),
            "version": version("atheris"),
            "runs": {**before.get("runs", {}), target: runs if status == 0 else None},
            "findings": sorted(found),
        }
        path.write_text(json.dumps(report, indent=2) + "\n")
    return status


def kept(path: Path) -> dict[str, Any]:
    """The content of a JSON file of counts; empty where there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def note(path: Path, results: dict[str, dict[str, Any]], seed: int, command: str) -> None:
    """Write the results to the JSON file, beside the counts by coverage."""
    about = {
        "command": command,
        "seed": seed,
        "inputs": sum(r["inputs"] for r in results.values()),
        "findings": sum(len(r["findings"]) for r in results.values()),
        "seconds": round(sum(r["seconds"] for r in results.values()), 1),
        "peak_memory_mib": peak() >> 20,
        "seconds_allowed_each": SECONDS,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("hypothesis", "safetensors", "tokenizers", "gguf")},
    }
    coverage = {name: block for name, block in kept(path).items() if name == "atheris"}
    path.write_text(json.dumps({**about, "targets": results, **coverage}, indent=2) + "\n")


def main() -> int:
    """Run the command. Returns 1 where there are findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the counts and findings here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of inputs")
    parser.add_argument("--only", nargs="*", help="these targets alone; the JSON file keeps the others'")
    parser.add_argument("--atheris", metavar="TARGET", help="fuzz one target by coverage")
    parser.add_argument("--runs", type=int, default=20000, help="inputs of --atheris")
    arguments = parser.parse_args()
    if arguments.atheris and arguments.json:
        return note_coverage(arguments.json, arguments.atheris, arguments.runs, arguments.seed)
    if not arguments.atheris:  # libFuzzer has an alarm of its own
        signal.signal(signal.SIGPROF, alarm)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        directory = Path(name)
        chosen = targets(directory)
        if arguments.atheris:
            by_coverage(
                next(t for t in chosen if t.name == arguments.atheris), arguments.runs, arguments.seed, directory
            )
            return 0
        earlier = kept(arguments.json) if arguments.json and arguments.only else {}
        before = earlier.get("targets", {})
        command = earlier.get("command", " ".join(["python -m benchmarks.fuzz", *sys.argv[1:]]))
        results = {target.name: before[target.name] for target in chosen if target.name in before}
        for target in chosen:
            if not arguments.only or target.name in arguments.only:
                count = max(1, int(COUNTS[target.name] * arguments.scale))
                results[target.name] = found = fuzz(target, count, arguments.seed, directory)
                line = f"{found['inputs']:7} inputs  {found['seconds']:7.1f} s  longest {found['longest_ms']:7.1f} ms"
                print(f"{target.name:22} {line}  {len(found['findings'])} findings", flush=True)
                for finding in found["findings"]:
                    print(f"    {finding['times']} x {finding['said']}\n      {finding.get('bytes', '')[:300]!r}")
                if arguments.json:  # after every target: what an interruption left is gone on with by --only
                    note(arguments.json, results, arguments.seed, command)
    findings = sum(len(r["findings"]) for r in results.values())
    print(f"{sum(r['inputs'] for r in results.values())} inputs, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
