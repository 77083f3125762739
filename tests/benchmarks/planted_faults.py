"""Let the fuzzer run functions with a known fault each, and print what it finds as JSON.

    python -m tests.benchmarks.planted_faults DIRECTORY

A process of its own: the fuzzer's alarm is SIGPROF, which libtpu uses too, and it counts the computing of all threads.
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import fuzz
from benchmarks.fuzz_seeds import Target

SEED = b'{"a": 1}'
HELD: list[bytes] = []  # the peak of memory grows only by what is held


def _raise(error: BaseException) -> None:
    raise error


FAULTS = {  # of a function that takes an input and the directory of its files
    "bare KeyError": lambda data, directory: {}["k"],
    "recursion": lambda data, directory: _raise(RecursionError("deep")),
    "panic": lambda data, directory: _raise(type("PanicException", (BaseException,), {})("rust")),
    "unnamed": lambda data, directory: _raise(ValueError("bad")),
    "hang": lambda data, directory: all(n == 0 for n in iter(int, 1)),
    "file": lambda data, directory: (directory / str(len(data))).touch(),
    "memory": lambda data, directory: HELD.append(b"1" * (64 << 20)),
    "none": lambda data, directory: _raise(FileNotFoundError(f"{directory}/x is missing")),  # a documented error
}


def look(name: str, fault: Callable[[bytes, Path], Any], directory: Path) -> dict[str, Any]:
    """What the fuzzer finds in a function with this fault, whose files are in a new directory."""
    directory.mkdir()
    target = Target("t", (SEED,), lambda data: data == SEED or fault(data, directory))
    return fuzz.fuzz(target, 50 if name == "none" else 6, 0, directory)


def main() -> None:
    """Run the command."""
    signal.signal(signal.SIGPROF, fuzz.alarm)
    fuzz.SECONDS, fuzz.GROWTH = 0.2, 32 << 20
    print(json.dumps({name: look(name, fault, Path(sys.argv[1], name)) for name, fault in FAULTS.items()}))


if __name__ == "__main__":
    main()
