"""Let the fuzzer run functions with a known fault each, and print what it finds as JSON.

    python -m tests.benchmarks.planted_faults DIRECTORY

A process of its own: the fuzzer's alarm counts the computing of all threads of its process, so the threads and the
garbage of other tests would be counted too.
"""

import json
import signal
import sys
from pathlib import Path

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


def main() -> None:
    """Run the command."""
    signal.signal(signal.SIGPROF, fuzz.alarm)
    fuzz.SECONDS, fuzz.GROWTH = 0.5, 32 << 20
    found = {}
    for name, fault in FAULTS.items():
        directory = Path(sys.argv[1], name)
        directory.mkdir()
        run = lambda data, fault=fault, directory=directory: data == SEED or fault(data, directory)  # noqa: E731
        found[name] = fuzz.fuzz(Target("t", (SEED,), run), 6, 0, directory)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
