"""Compiled programs: a process can hold a limited number of them."""

from __future__ import annotations

import gc
from pathlib import Path

import jax

MAPS, MOST = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def drop_programs(maps: Path = MAPS, most: Path = MOST) -> bool:
    """Drop all compiled programs where the process uses half of the memory maps that Linux allows it."""
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
