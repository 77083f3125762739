"""Several hosts as one run on jax.distributed: they connect, compare their settings and end together."""

from __future__ import annotations

import contextlib
import json
import os
import platform
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
from butler_jax.parallel.heartbeats import ENDED, GRACE, LEAVING, lost, lost_words, watch_others
from butler_jax.parallel.messages import try_to_tell
from butler_jax.storage import to_dict


def join_hosts(config: HostsConfig) -> None:
    """Join the run that `config` describes; do nothing where config.distributed is empty.

    It returns once all processes are connected and have the same settings and versions. From then on they end together:
    `host_timeout` seconds after the last sign of life of one process, the others end with a message and status 1. If a
    process is missing after `start_timeout` seconds, this one ends likewise.

    Raises:
        ValueError: No cluster is found, or settings, versions or numbers of devices differ. Every process raises it.
    """
    if not config.distributed:
        return
    given = parse_hosts(config.distributed)
    if given:
        who, where = f"process {given.index}", f" at {given.address} for the {given.count} processes of this run"
        remedy = f", each with its own INDEX, and check that {given.address} is process 0's and can be reached"
    else:
        who, where, remedy = "this process", " for the others of the cluster", " of the cluster"
    message = (
        f"error: {who} waited {config.start_timeout} s{where}, and not all came; start the same command on every "
        f"host{remedy}"
    )

    def give_up() -> None:  # JAX would abort without naming the address
        say(message)
        os._exit(1)

    # JAX's preemption service would handle SIGTERM itself. The training loop does, and agrees on the last step.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(config.start_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *(given or ()),
            initialization_timeout=config.start_timeout + 60,
            heartbeat_timeout_seconds=2 * config.host_timeout + 10,  # JAX would abort without our line
            shutdown_timeout_seconds=config.host_timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        advice = "check that its port is free" if given else "outside of a cluster, give HOST:PORT,COUNT,INDEX"
        raise ValueError(f"--distributed {config.distributed} does not work here ({reason}); {advice}") from None
    finally:
        timer.cancel()
    watch_others(config.host_timeout)
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) != 1:
        raise ValueError(
            "every process needs as many devices as the others; there are "
            + ", ".join(f"{n} in process {p}" for p, n in sorted(devices.items()))
        )
    settings = {name: value for name, value in to_dict(config).items() if name != "distributed"}
    agree({"command": Path(sys.argv[0]).name, "Python": platform.python_version(), "jax": jax.__version__, **settings})
    say(
        f"process {jax.process_index()} of {jax.process_count()}; if one dies, the others end within about "
        f"{config.host_timeout} s, and the same command on every host continues the run"
    )


def gather(value: Any) -> list[Any]:
    """Collect one value from every process. All processes have to call it; they wait for each other.

    Args:
        value: Anything that JSON can hold.

    Returns:
        The values in process order, the same list in every process.
    """
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(raw.size))
    width = 1 << int(sizes.max()).bit_length()  # every width compiles once, so there are few
    padded = multihost_utils.process_allgather(np.pad(raw, (0, width - raw.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(padded, sizes, strict=True)]


def agree(facts: dict[str, Any]) -> None:
    """Check that all processes pass the same facts, JSON values by name. All have to call it.

    Raises:
        ValueError: Names the facts that differ, with their values. Every process raises it.
    """
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
    """Check that a directory is the same one for all processes. All have to call it; nothing is left behind.

    Process 0 creates the directory if need be and a file in it. The others wait up to `seconds` until they see that
    file, since a shared file system may show it late.

    Raises:
        ValueError: Names the processes that do not see the file. Every process raises it.
        OSError: Process 0 cannot write there. Every process raises it.
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
        for path in made:  # the innermost first; a directory that is not empty stays
            with contextlib.suppress(OSError):
                path.rmdir()
    if blind:
        raise ValueError(
            f"process {', '.join(blind)} does not see in {directory} what process 0 writes there: give a directory "
            "that all hosts share"
        )


def say(text: str) -> None:
    """Write a line to this process's stderr."""
    print(text, file=sys.stderr, flush=True)


def leave(error: BaseException) -> NoReturn:
    """Print the error as one line and end at once with status 1. A regular exit would wait for the other processes."""
    LEAVING.set()
    words = str(error)
    if lost(error):
        words = lost_words((words.splitlines() or [""])[0])
    else:
        try_to_tell(ENDED, True)
    say(f"error: {words}")
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(GRACE + 2)  # when process 0 ends, JAX ends the others at once: they print their errors before
    sys.stdout.flush()
    os._exit(1)
