"""Signs of life between the processes of a run: one that is gone or frozen ends the others in a line.

JAX watches its processes too, but aborts them without one. Here every process counts up a number that the others see.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
from typing import NoReturn

import jax

from butler_jax.parallel.messages import told, try_to_tell

ENDED = "ended"
"""Name under which a process that ends with an error tells it."""

BEATS = "beats"
"""Name under which processes tell their numbers, and at last LEFT."""

LEFT = "left"

LEAVING = threading.Event()
"""Set where this process ends by itself, so that it does not end because another one did."""

GRACE = 2.0
"""Seconds in which a process may find by itself the error with which another one has ended."""

PAUSE = 0.5
"""Seconds between two looks."""

LOST = re.compile(r"gloo|nccl|barrier|coordination service", re.IGNORECASE)
"""Matches the errors that a computation or a checkpoint raises when another process is gone."""


class Silence:
    """Seconds without a sign of life, by process.

    A look adds at most one second, however long ago the last one was: a process that was itself frozen, or did not come
    to look, suspects no other for it.
    """

    def __init__(self):
        self.seconds: dict[int, float] = {}
        self.looked = time.monotonic()
        self._beats: dict[int, object] = {}

    def look(self, beats: dict[int, object]) -> None:
        """Compare what processes tell now with what they told before."""
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, 1.0), now
        for index, beat in beats.items():
            silent = beat == self._beats.get(index) and beat != LEFT
            self.seconds[index] = self.seconds.get(index, 0.0) + passed if silent else 0.0
        self._beats = dict(beats)


def watch_others(seconds: float) -> None:
    """Watch the other processes from threads, and end this one in a line once one of them is lost.

    seconds: without a sign of life from it; one that ends with an error is told at once.
    """
    rounds = 0

    def listen() -> None:
        nonlocal rounds
        silence = Silence()
        while not LEAVING.wait(PAUSE):
            try_to_tell(BEATS, rounds)
            if others := set(told(ENDED)) - {jax.process_index()}:
                if not LEAVING.wait(GRACE):
                    end(f"process {min(others)} ended with an error")
                return
            silence.look({i: beat for i, beat in told(BEATS).items() if i != jax.process_index()})
            for index, silent in silence.seconds.items():
                if silent > seconds:
                    end(f"process {index} has given no sign of life for {silent:.0f} s")
            rounds += 1

    def guard() -> None:
        """Where the first process is frozen, the service does not answer, and `listen` waits for ever."""
        silence = Silence()
        while not LEAVING.wait(PAUSE):
            silence.look({0: rounds})
            if silence.seconds[0] > seconds:
                end(f"process 0 has given no answer for {silence.seconds[0]:.0f} s")

    def part() -> None:  # before JAX leaves the service
        LEAVING.set()
        threads[0].join(timeout=5.0)
        try_to_tell(BEATS, LEFT)

    threads = [threading.Thread(target=one, daemon=True) for one in (listen, guard)]
    for thread in threads:
        thread.start()
    atexit.register(part)


def end(reason: str) -> NoReturn:
    """End this process in a line, since another one is lost."""
    print(f"error: {lost_words(reason)}", file=sys.stderr, flush=True)
    os._exit(1)


def lost(error: BaseException) -> bool:
    """Whether an error says that other processes of the run are gone."""
    return jax.distributed.is_initialized() and bool(LOST.search(str(error)))


def lost_words(reason: str) -> str:
    """The line of a process that has lost another one."""
    return (
        f"process {jax.process_index()} lost another one, which ended or cannot be reached ({reason}); read the "
        "messages of that one, and start the same command on every host again to continue"
    )
