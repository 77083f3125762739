"""Processes with several CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def host_devices(count: int) -> str:
    """XLA_FLAGS for a process with so many CPU devices, beside the flags that this one compiles with."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()


def run_on_devices(count: int, script: str, *arguments: str, optimised: bool = True, timeout: int = 1800) -> str:
    """What a script prints in a process with so many CPU devices.

    Args:
        arguments: Of the script, behind the path of the repository.
        optimised: Where not, XLA leaves most optimisations out: nearly all of the time is compilation.
        timeout: Seconds.
    """
    environment = {**os.environ, "XLA_FLAGS": host_devices(count), "JAX_PLATFORMS": "cpu"}
    if not optimised:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    command = [sys.executable, "-c", script, str(REPOSITORY), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
