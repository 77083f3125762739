"""Words between the processes of a run through JAX's coordination service, which needs no device and waits for none."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import jax
from jax._src import distributed  # its key-value store has no public door

PAUSE = 0.05  # seconds between two looks


def tell(name: str, value: Any) -> None:
    """Tell all processes a JSON value under a name. A later value of this process takes its place."""
    if (client := distributed.global_state.client) is not None:
        client.key_value_set(f"butler_jax/{name}/{jax.process_index()}", json.dumps(value), allow_overwrite=True)


def try_to_tell(name: str, value: Any) -> None:
    """`tell`, where the service still answers."""
    with contextlib.suppress(Exception):  # it is gone: its process ended, which JAX tells
        tell(name, value)


def told(name: str) -> dict[int, Any]:
    """What the processes have told under a name, by their numbers. It is empty where the service does not answer."""
    client = distributed.global_state.client
    with contextlib.suppress(Exception):  # the service is gone, or nobody has told anything
        found = client.key_value_dir_get(f"butler_jax/{name}/") if client is not None else []
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}
    return {}


def exchange(name: str, value: Any, until: float) -> list[Any]:
    """What every process tells under a name, in their order; as `gather`, but while the devices compute.

    until: when it is given up, of `time.monotonic`.

    Raises:
        OSError: Not all have told by then.
    """
    if jax.process_count() == 1:
        return [value]
    tell(name, value)
    while len(there := told(name)) < jax.process_count():
        if time.monotonic() > until:
            missing = [str(index) for index in range(jax.process_count()) if index not in there]
            raise OSError(f"process {', '.join(missing)} did not answer in time")
        time.sleep(PAUSE)
    return [there[index] for index in range(jax.process_count())]


def stand_alike(name: str, number: int, until: float, *, passed: str) -> bool:
    """Whether all processes stand at `number`; False as soon as another one stands at a later number or passed one.

    A process that goes on from there calls it again with its new number. Raises as `exchange` does.

    Args:
        name: Under which a process tells the number that it stands at. It stays there while it waits.
        until: As of `exchange`.
        passed: Under which a process tells the last number that it has passed without standing.
    """
    if jax.process_count() == 1:
        return True
    tell(name, number)
    while True:
        there = told(name)
        if max([*there.values(), *told(passed).values()]) > number:
            return False
        if len(there) == jax.process_count() and min(there.values()) == number:
            return True
        if time.monotonic() > until:
            raise OSError("the other processes did not come to the same step in time")
        time.sleep(PAUSE)
