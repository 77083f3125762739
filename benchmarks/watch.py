"""Live buffers, resident memory and compiled programs of a process, for long runs and their tests."""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import time
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # one event a program, found in the persistent cache or not


class Compilations:
    """Counts the programs that XLA builds, of every size, and the seconds it takes, while it is open."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def _note(self, event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            self.count, self.seconds = self.count + 1, self.seconds + seconds

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._note)


def memory_mib(*, trim: bool = True) -> tuple[float, float]:
    """Resident memory of this process in MiB, and its peak so far; 0 where the system does not say.

    trim: What the allocator holds in reserve is given back first, which takes milliseconds.
    """
    if trim:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return 0.0, 0.0
    held = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
    return int(held["VmRSS"]) / 2**10, int(held["VmHWM"]) / 2**10


class Watch:
    """Samples of a long run; open while it lasts. rows: one dict a sample."""

    def __init__(self):
        self.rows: list[dict[str, float]] = []
        self.compilations = Compilations()

    def __enter__(self) -> Watch:
        self.compilations.__enter__()
        self.began, self.worked = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.compilations.__exit__()

    def note(self, done: int, **more: Any) -> None:
        """One sample after so many steps or tokens."""
        live = jax.live_arrays()
        resident, peak = memory_mib()
        self.rows.append(
            {
                "done": done,
                "seconds": time.perf_counter() - self.began,
                "processor_seconds": time.process_time() - self.worked,
                "live_arrays": len(live),
                "live_mib": sum(a.nbytes for a in live) / 2**20,
                "resident_mib": resident,
                "peak_mib": peak,
                "compilations": self.compilations.count,
                **more,
            }
        )

    def columns(self) -> dict[str, list[float]]:
        """The samples as lists, of two decimals."""
        return {name: [round(row[name], 2) for row in self.rows] for name in self.rows[0]}

    def summary(self) -> dict[str, Any]:
        """Memory at the start and the end, and speed, a second of processor time, of the first and the last tenth.

        The start is the second sample: everything has been done once before it, a checkpoint and a validation too.
        """
        rows = self.rows[1:]
        tenth = max(len(rows) // 10, 1)

        def speed(a, b):
            return (b["done"] - a["done"]) / (b["processor_seconds"] - a["processor_seconds"])

        first, last = speed(rows[0], rows[tenth]), speed(rows[-1 - tenth], rows[-1])
        names = ("live_arrays", "live_mib", "resident_mib", "peak_mib", "compilations")
        ends = {name: [rows[0][name], rows[-1][name]] for name in names}
        return {
            **{name: rows[-1][name] for name in ("done", "seconds", "processor_seconds")},
            "a_second": [first, last],
            "last_over_first": last / first,
            **ends,
        }
