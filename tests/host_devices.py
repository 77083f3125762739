"""Processes with several CPU devices."""

import os


def host_devices(count: int) -> str:
    """XLA_FLAGS for a process with so many CPU devices, beside the flags that this one compiles with."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
