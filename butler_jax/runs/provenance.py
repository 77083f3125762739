"""Where a result comes from: versions, git revision, command, environment and devices, ready for JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("butler-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
VARIABLES = re.compile(r"JAX_|XLA_|TPU_|LIBTPU|MEGASCALE_|NCCL_|SLURM_|CUDA_VISIBLE_DEVICES$|TFDS_DATA_DIR$|HF_HOME$")
SECRETS = re.compile(r"TOKEN|SECRET|PASS|KEY|JWT|CREDENTIAL|AUTH", re.IGNORECASE)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def revision(directory: Path = Path(__file__).parent) -> dict[str, Any] | None:
    """{"revision", "dirty"} of the git checkout that this package's source belongs to; None outside of one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # or it lies in another project's checkout
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this process."""
    program, *arguments = sys.argv
    named = ["butler-jax"] if Path(program).name == "__main__.py" else ["python", program]
    return shlex.join([*named, *arguments])


def environment() -> dict[str, str]:
    """The environment variables that JAX, its devices and the cluster read, without those that may hold secrets."""
    return {n: v for n, v in sorted(os.environ.items()) if VARIABLES.match(n) and not SECRETS.search(n)}


def devices() -> dict[str, Any]:
    """The platform, the number of devices of each kind, and the number of processes, over all processes."""
    return {
        "platform": jax.default_backend(),
        "kinds": dict(Counter(device.device_kind for device in jax.devices())),
        "processes": jax.process_count(),
    }
