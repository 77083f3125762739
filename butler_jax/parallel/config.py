"""Settings of a command that runs on several hosts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from butler_jax.storage import require_positive


class Host(NamedTuple):
    """Where the first process of a run listens, how many processes there are, and which of them this one is."""

    address: str
    count: int
    index: int


def parse_hosts(text: str) -> Host | None:
    """Read the value of --distributed, "auto" (None) or "HOST:PORT,COUNT,INDEX".

    Raises:
        ValueError: The text is neither, the port is out of range, or INDEX is not below COUNT.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"([^,\s]+:([0-9]{1,5})),([0-9]{1,9}),([0-9]{1,9})", text)
    if not match:
        raise ValueError(f"--distributed {text!r} is neither auto nor HOST:PORT,COUNT,INDEX, as in 10.0.0.1:1234,4,0")
    host = Host(match[1], int(match[3]), int(match[4]))
    if not (0 < int(match[2]) < 65536):
        raise ValueError(f"--distributed {text!r}: {match[2]} is no port; ports are 1 ... 65535")
    if host.count == 0:
        raise ValueError(f"--distributed {text!r}: the number of processes must be at least 1")
    if host.index >= host.count:
        raise ValueError(
            f"--distributed {text!r}: {host.index} is none of the {host.count} processes; they are 0 ... "
            f"{host.count - 1}"
        )
    return host


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """How a command joins a run on several hosts."""

    distributed: str = ""
    """Run on several hosts through jax.distributed; start the same command on each. auto: the cluster tells the
    processes apart (TPU pods, Slurm). Otherwise HOST:PORT,COUNT,INDEX."""
    start_timeout: int = 300
    """Seconds that a host waits for the others at the start."""
    host_timeout: int = 30
    """Seconds without a heartbeat from a host after which the others end."""

    def __post_init__(self):
        if self.distributed:
            parse_hosts(self.distributed)
        require_positive(self, "start_timeout", "host_timeout")
