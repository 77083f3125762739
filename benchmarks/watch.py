"""What a process holds and compiles: live buffers, resident memory, programs built. For long runs and their tests."""

from __future__ import annotations

import os
import pathlib
import time
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # one event a program, found in the persistent cache or not


class Compilations:
    """Counts the programs that XLA builds, of every size, while it is open; use as a context manager."""

    def __init__(self):
        self.count = 0

    def _note(self, event: str, seconds: float, **_: Any) -> None:
        self.count += event == COMPILED

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._note)


def resident_mib() -> float:
    """Resident memory of this process in MiB; 0 where the system does not say."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


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
        self.rows.append(
            {
                "done": done,
                "seconds": time.perf_counter() - self.began,
                "processor_seconds": time.process_time() - self.worked,
                "live_arrays": len(live),
                "live_mib": sum(a.nbytes for a in live) / 2**20,
                "resident_mib": resident_mib(),
                "compilations": self.compilations.count,
                **more,
            }
        )

    def summary(self) -> dict[str, Any]:
        """Memory at the start and the end, and speed, a second of processor time, of the first and the last tenth.

        The sample that starts it all is the first: before it everything is compiled.
        """
        seen = self.rows[1:]
        tenth = max(len(seen) // 10, 1)

        def speed(a, b):
            return (b["done"] - a["done"]) / (b["processor_seconds"] - a["processor_seconds"])

        first, last = speed(self.rows[0], self.rows[tenth]), speed(self.rows[-1 - tenth], self.rows[-1])
        names = ("live_arrays", "live_mib", "resident_mib", "compilations")
        ends = {name: [self.rows[0][name], self.rows[-1][name]] for name in names}
        return {
            "done": self.rows[-1]["done"],
            "seconds": self.rows[-1]["seconds"],
            "processor_seconds": self.rows[-1]["processor_seconds"],
            "a_second": [first, last],
            "last_over_first": last / first,
            **ends,
            "resident_mib_peak": max(row["resident_mib"] for row in self.rows),
        }
