"""Compiled programs, of which a process may hold only so many."""

from __future__ import annotations

import gc
from pathlib import Path

import jax

MAPS, MOST = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def leave_room(maps: Path = MAPS, most: Path = MOST) -> bool:
    """Drop all compiled programs where they may have taken half of the memory maps that Linux allows; whether it did.

    XLA takes several maps a program on CPU, and at the limit (65,530 unless it was set otherwise) it ends with "LLVM
    compilation error: Cannot allocate memory". What is needed again is compiled again. Elsewhere nothing is done.
    """
    try:
        with maps.open("rb") as lines:
            taken = sum(1 for _ in lines)
        full = taken > int(most.read_text()) // 2
    except (OSError, ValueError):
        return False
    if full:
        jax.clear_caches()
        gc.collect()
    return full
