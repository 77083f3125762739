"""Several hosts as one run, on jax.distributed: they find each other, agree on what they do, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from butler_jax.parallel.config import HostsConfig, parse_hosts
from butler_jax.storage import to_dict

LOST = re.compile(r"gloo|nccl|barrier|coordination service", re.IGNORECASE)
"""What is in errors of a computation, or of a checkpoint, whose other processes are gone."""


def join_hosts(config: HostsConfig) -> None:
    """Become one process of the run that `config` describes; nothing where config.distributed is empty.

    Returns when all processes are there and were found to have the same settings and versions. From then on they end
    together: JAX's service ends those that are left `host_timeout` seconds after the last sign of life from one.

    Raises ValueError in every process where settings, versions or numbers of devices differ, or where no cluster is
    found. Where not all come in `start_timeout` seconds the process ends with a message and status 1.
    """
    if not config.distributed:
        return
    given = parse_hosts(config.distributed)
    if given:
        who, where = f"process {given.index}", f" at {given.address} for the {given.count} processes of this run"
        remedy = f", each with its own INDEX, and see that {given.address} is process 0's and can be reached"
    else:
        who, where, remedy = "this process", " for the others of the cluster", " of the cluster"

    def give_up() -> None:  # JAX would abort, naming no address
        say(f"error: {who} waited {config.start_timeout} s{where}, and not all came; start the same command on every "
            f"host{remedy}")  # fmt: skip
        os._exit(1)

    # The service takes SIGTERM for itself; fitting.py listens for it and agrees on the step.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(config.start_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *(given or ()),
            initialization_timeout=config.start_timeout + 60,
            heartbeat_timeout_seconds=config.host_timeout,
            shutdown_timeout_seconds=config.host_timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        advice = (
            "see that its port is free" if given else "where no cluster says who is who, it is HOST:PORT,COUNT,INDEX"
        )
        raise ValueError(f"--distributed {config.distributed} does not work here ({reason}); {advice}") from None
    finally:
        timer.cancel()
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) != 1:
        raise ValueError(
            "every process needs as many devices as the others; there are "
            + ", ".join(f"{n} in process {p}" for p, n in sorted(devices.items()))
        )
    settings = {name: value for name, value in to_dict(config).items() if name != "distributed"}
    agree({"command": Path(sys.argv[0]).name, "Python": platform.python_version(), "jax": jax.__version__, **settings})
    say(
        f"process {jax.process_index()} of {jax.process_count()}; should one die, the others end within about "
        f"{config.host_timeout} s: start the same command on every host again then"
    )


def gather(value: Any) -> list[Any]:
    """What every process passes, in process order; JSON. All processes have to call it, and wait for each other."""
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(raw.size))
    width = 1 << int(sizes.max()).bit_length()  # a few widths, for each is compiled
    padded = multihost_utils.process_allgather(np.pad(raw, (0, width - raw.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(padded, sizes, strict=True)]


def agree(facts: dict[str, Any]) -> None:
    """Raise ValueError, in every process, naming the facts that are not the same in all; JSON."""
    found = gather(facts)
    different = []
    for name in dict.fromkeys(name for one in found for name in one):
        holders = defaultdict(list)
        for index, one in enumerate(found):
            holders[json.dumps(one.get(name))].append(str(index))
        if len(holders) > 1:
            parts = (f"{value} in process {', '.join(indices)}" for value, indices in holders.items())
            different.append(f"{name}: {'; '.join(parts)}")
    if different:
        raise ValueError(
            f"the processes of this run differ ({' | '.join(different)}); start the same command on every host, with "
            "the same versions and files"
        )


def check_shared(directory: Path, *, seconds: float = 10.0) -> None:
    """Raise ValueError in every process where a directory, there or still to be made, is not the same one for all.

    The first process leaves a mark in it, which the others have to see within some seconds, for a file system may be
    slow to show it; nothing is left behind. Raises OSError, in every process too, where the first cannot write there.
    """
    mark = directory / f".shared-{gather(uuid.uuid4().hex)[0]}"
    made, problem = [], ""
    if jax.process_index() == 0:
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            problem = str(error)
    if problem := gather(problem)[0]:
        raise OSError(problem)
    until = time.monotonic() + seconds
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    blind = [str(index) for index, one in enumerate(gather(seen)) if not one]
    if jax.process_index() == 0:
        mark.unlink()
        for path in made:  # the innermost first; what is not empty stays
            with contextlib.suppress(OSError):
                path.rmdir()
    if blind:
        raise ValueError(
            f"process {', '.join(blind)} does not see in {directory} what process 0 writes there: give a directory "
            "that all hosts share"
        )


def say(text: str) -> None:
    """A line on this process's stderr."""
    print(text, file=sys.stderr, flush=True)


def lost(error: BaseException) -> bool:
    """Whether an error says that other processes of the run are gone."""
    return jax.distributed.is_initialized() and bool(LOST.search(str(error)))


def leave(error: BaseException) -> NoReturn:
    """End at once with the error in one line and status 1, for a regular exit would wait for the others.

    They may be gone, which is what `error` then says, or not know of it: they learn it from this one's end.
    """
    words = str(error)
    if lost(error):
        reason = (words.splitlines() or [""])[0]
        words = (
            f"process {jax.process_index()} lost another one, which ended or cannot be reached ({reason}); see what "
            "that one said, and start the same command on every host again to go on"
        )
    say(f"error: {words}")
    if jax.process_index() == 0:
        time.sleep(3)  # when the first process ends, JAX ends all others at once: they say theirs before
    sys.stdout.flush()
    os._exit(1)
