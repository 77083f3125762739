"""The memory of devices."""

from __future__ import annotations

import os

import jax


def memory_of(device: jax.Device) -> int | None:
    """The bytes of memory of a device; of the whole machine for a CPU device. None where nothing tells."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
