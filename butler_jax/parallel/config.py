"""Settings of a command that runs on several hosts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Host(NamedTuple):
    """Where the first process of a run listens, how many processes there are, and which of them this one is."""

    address: str
    count: int
    index: int


def parse_hosts(text: str) -> Host | None:
    """'HOST:PORT,COUNT,INDEX' -> Host; None for 'auto'. Raises ValueError for anything else."""
    if text == "auto":
        return None
    match = re.fullmatch(r"([^,\s]+:([0-9]{1,5})),([0-9]{1,9}),([0-9]{1,9})", text)
    if not match:
        raise ValueError(f"--distributed {text!r} is neither auto nor HOST:PORT,COUNT,INDEX, as in 10.0.0.1:1234,4,0")
    host = Host(match[1], int(match[3]), int(match[4]))
    if not (0 < int(match[2]) < 65536):
        raise ValueError(f"--distributed {text!r}: {match[2]} is no port; ports are 1 ... 65535")
    if not host.count > 0:
        raise ValueError(f"--distributed {text!r}: the number of processes must be at least 1")
    if not host.index < host.count:
        raise ValueError(
            f"--distributed {text!r}: {host.index} is none of the {host.count} processes; they are 0 ... "
            f"{host.count - 1}"
        )
    return host


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """What a command needs to know to run on several hosts."""

    distributed: str = ""
    """Several hosts through jax.distributed, the same command on each: auto where the cluster says who is who (TPU
    pods, Slurm), else HOST:PORT,COUNT,INDEX."""
    start_timeout: int = 300
    """Seconds that a host waits for the others at the start."""
    host_timeout: int = 30
    """Seconds without a sign of life from a host until the others end."""

    def __post_init__(self):
        if self.distributed:
            parse_hosts(self.distributed)
        for name in ("start_timeout", "host_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1 s, got {getattr(self, name)}")
